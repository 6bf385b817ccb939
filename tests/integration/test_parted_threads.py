"""The CPU's cores serve whichever device asks: several have no more threads than one."""

import gc
import os
from typing import Any

import pytest
import torch

import headinfer
from headinfer.attend.native.workers import shared_workers
from headinfer.device.simulated import SimulatedDevice
from headinfer.integration.calls import cache_argument
from parted import spread
from tiny_models import random_tokens, tiny_model

THREADS = 3
SMALL: dict[str, Any] = {"tile_heads": 1, "tile_tokens": 64, "chunk_tokens": 64}


@pytest.fixture(autouse=True)
def _threads() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    yield
    torch.set_num_threads(before)


def pools(monkeypatch: pytest.MonkeyPatch, devices: list[SimulatedDevice]) -> set[int]:
    """Return the pools of threads that decode steps with the host's help have used."""
    used: set[int] = set()

    def noted(*args: Any) -> Any:
        workers = shared_workers(*args)
        assert args[1] == THREADS - 1
        used.add(workers.address)
        return workers

    monkeypatch.setattr("headinfer.attend.native.job.shared_workers", noted)
    model, tokens = tiny_model("llama3", hidden_size=256, head_dim=64), random_tokens(1, 300)
    with headinfer.attach(
        model, device="simulated", simulated_device=devices, host_attention=0.5, **SMALL
    ) as offload:
        cache = offload.new_cache()
        model(tokens, **cache_argument(model, cache))
        model(tokens[:, :1], **cache_argument(model, cache))
        assert offload.stats.bytes_attended_on_host > 0
        assert len(offload.plan.of_devices) == len(set(devices))
    del cache
    gc.collect()
    return used


@pytest.mark.skipif(not hasattr(os, "register_at_fork"), reason="jobs have threads under Linux")
def test_devices_share_one_pool_of_all_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    one = pools(monkeypatch, spread(0, 0, 0))
    if not one or one == {0}:
        pytest.skip("no C compiler: the host's attention is Python's")
    assert len(one) == 1
    assert len(pools(monkeypatch, spread(0, 1, 2))) == 1
