"""A disk below host memory beside windows, states, streaming heads and odd batches."""

import contextlib
import errno
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import headinfer
from above_disk import SETTINGS
from headinfer.device.simulated import SimulatedDevice
from headinfer.errors import CacheStateError, DiskError
from tiny_models import random_tokens, tiny_model


def no_room(*_: Any) -> int:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.covering(most=1)
@pytest.mark.parametrize(
    ("name", "changes", "memory"),
    [
        ("gemma3", {"num_hidden_layers": 3, "sliding_window": 24}, "700KiB"),
        ("qwen3-next", {"num_hidden_layers": 2}, "400KiB"),
    ],
    ids=["windows", "states"],
)
def test_a_full_disk_beside_windows_and_states(
    name: str,
    changes: dict[str, Any],
    memory: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if name == "gemma3":
        changes = {**changes, "layer_types": ["sliding_attention", *["full_attention"] * 2]}
    else:
        changes = {**changes, "layer_types": ["linear_attention", "full_attention"]}
    model, prompt = tiny_model(name, **changes), random_tokens(1, 1500)
    with headinfer.attach(model, **SETTINGS, disk_cache=tmp_path, host_memory=memory) as offload:
        cache = offload.new_cache()
        wanted = model(prompt, past_key_values=cache, logits_to_keep=1).logits
        assert offload.stats.bytes_to_disk > 0
        cache.reset()
        with monkeypatch.context() as faulty:
            faulty.setattr(os, "pwritev", no_room)
            with pytest.raises(DiskError, match="has no room"):
                model(prompt, past_key_values=cache)
        # It is whole where it was told between two chunks. Within one, what a window or a state has
        # lost does not come back.
        with contextlib.suppress(CacheStateError):
            left = prompt[:, cache.get_seq_length() :]
            rest = model(left, past_key_values=cache, logits_to_keep=1).logits
            torch.testing.assert_close(rest, wanted)
        cache.reset()
        again = model(prompt, past_key_values=cache, logits_to_keep=1).logits
        assert torch.equal(again, wanted)


@pytest.mark.covering(most=1)
@pytest.mark.parametrize(
    ("rows", "options", "memory"),
    [
        (
            1,
            {"sparsity": 0.5, "head_pattern": "random", "sink_tokens": 3, "recent_tokens": 7},
            "260KiB",
        ),
        (2, {"tile_tokens": 48, "chunk_tokens": 77}, "900KiB"),
        (3, {"tile_tokens": 128, "tile_heads": 2, "chunk_tokens": 101}, "1800KiB"),
    ],
    ids=["streaming", "two", "three"],
)
def test_the_same_as_in_memory(
    model: PreTrainedModel, tmp_path: Path, rows: int, options: dict[str, Any], memory: str
) -> None:
    prompt, found = random_tokens(rows, 733), []
    for folder in (None, tmp_path):
        device = SimulatedDevice(seed=2)
        with headinfer.attach(
            model,
            **{**SETTINGS, **options},
            simulated_device=device,
            disk_cache=folder,
            host_memory=folder and memory,
        ) as offload:
            cache = offload.new_cache(900)
            logits = [model(prompt, past_key_values=cache, logits_to_keep=1).logits]
            for tokens in (1, 1, 37, 1, 90):
                logits.append(model(prompt[:, :tokens], past_key_values=cache).logits)
            assert (offload.stats.bytes_from_disk > 0) is (folder is not None)
            cache.close()
        device.memory.check()
        found.append(torch.cat([each.flatten() for each in logits]))
    assert torch.equal(*found)
