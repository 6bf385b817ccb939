"""A parked cache holds no arena, shares what it forked from, and goes on as if nothing had been."""

from typing import Any

import pytest
import torch

import headinfer
from headinfer.device.simulated import SimulatedDevice
from headinfer.integration.calls import cache_argument
from headinfer.integration.memory_held import held_by
from tiny_models import random_tokens, shared_model

SMALL: dict[str, Any] = {"chunk_tokens": 16, "tile_tokens": 8}
OPTIONS: dict[str, dict[str, Any]] = {
    "cpu": {"device": "cpu", **SMALL},
    "link": {"device": "simulated", "resident_tokens": 0, **SMALL},
    "shared": {"device": "simulated", "resident_tokens": 20, "host_attention": 0.5, **SMALL},
    "resident": {"device": "simulated", "resident_tokens": "all", **SMALL},
}


def read(model: Any, cache: Any, *parts: torch.Tensor) -> torch.Tensor:
    logits = [model(part, **cache_argument(model, cache)).logits for part in parts]
    return torch.cat(logits, dim=1)


def stock(model: Any, *parts: torch.Tensor) -> torch.Tensor:
    return model(torch.cat(parts, dim=1)).logits


@pytest.mark.covering
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("name", ["llama3", "gemma3", "qwen3-next"])
def test_parking_and_forking_change_no_result(name: str, options: str) -> None:
    model, whole = shared_model(name), random_tokens(1, 190)
    prompt, first, second = whole[:, :130], whole[:, 130:160], whole[:, 160:]
    steps = random_tokens(1, 6, seed=5).split(1, dim=1)
    wanted = stock(model, prompt, first, second, *steps)[:, 130:]
    other = stock(model, prompt, second)[:, 130:]
    with headinfer.attach(model, **OPTIONS[options]) as offload:
        cache = offload.new_cache()
        read(model, cache, prompt)
        fork = cache.fork()
        kept = fork.fork()
        logits = [read(model, cache, first)]
        cache.park()
        cache.park()  # does nothing more
        assert torch.allclose(read(model, fork, second), other, atol=2e-4)
        logits.append(read(model, cache, second, *steps))
        assert torch.allclose(torch.cat(logits, dim=1), wanted, atol=2e-4)
        again = read(model, kept, first, second, *steps)
        assert torch.allclose(again, wanted, atol=2e-4)


def test_a_parked_cache_holds_no_gpu_memory() -> None:
    prompt = random_tokens(1, 100)
    for name in ("llama3", "gemma3"):
        model, device = shared_model(name), SimulatedDevice()
        options = {**OPTIONS["resident"], "simulated_device": device}
        with headinfer.attach(model, **options) as offload:
            cache = offload.new_cache(400)
            read(model, cache, prompt)
            before = held_by(cache)
            assert device.allocated_bytes > 0
            cache.park()
            after = held_by(cache)
            assert device.allocated_bytes == 0
            assert after.tokens == before.tokens == 100
            assert before.device_bytes > after.device_bytes == 0
            cache.crop(-10)
            read(model, cache, prompt[:, 90:])
            assert held_by(cache).device_bytes > after.device_bytes


def test_forks_share_cpu_memory_and_count_once() -> None:
    model, prompt = shared_model("llama3"), random_tokens(1, 600)
    with headinfer.attach(model, host_memory="64MiB", **OPTIONS["cpu"]) as offload:
        cache = offload.new_cache()
        read(model, cache, prompt)
        session = offload.session
        alone = session.host_room(0).held_bytes
        forks = [cache.fork() for _ in range(3)]
        assert session.host_room(0).held_bytes == alone > 0
        read(model, forks[0], prompt[:, :16])
        more = session.host_room(0).held_bytes - alone
        assert 0 < more < alone
        cache.close()
        assert torch.allclose(
            read(model, forks[1], prompt[:, :1]),
            stock(model, prompt, prompt[:, :1])[:, 600:],
            atol=2e-4,
        )
        for fork in forks:
            fork.close()
        assert session.host_room(0).held_bytes == 0


def test_a_parked_cache_yields_to_nobody_and_takes_its_arena_back() -> None:
    """Plans of others count what a parked cache holds as free, and do not rebuild it."""
    model, prompt = shared_model("llama3"), random_tokens(1, 120)
    options = {"device": "simulated", "device_memory": "1900KiB", **SMALL}
    with headinfer.attach(model, **options) as offload:
        cache = offload.new_cache()
        read(model, cache, prompt)
        residents = cache.state.engine.plan.resident_tokens
        cache.park()
        other = offload.new_cache()
        read(model, other, prompt)
        assert other.state.engine.plan.resident_tokens == residents > 0
        assert cache.state.engine.parked
        logits = read(model, cache, prompt[:, :20])
        wanted = stock(model, prompt, prompt[:, :20])[:, 120:]
        assert torch.allclose(logits, wanted, atol=2e-4)


def test_rows_of_a_parked_cache_may_be_chosen() -> None:
    model, prompt = shared_model("llama3"), random_tokens(2, 60)
    with headinfer.attach(model, **OPTIONS["link"]) as offload:
        cache = offload.new_cache()
        read(model, cache, prompt)
        cache.park()
        cache.batch_select_indices([1, 0])
        logits = read(model, cache, prompt[:, :5])
        wanted = stock(model, prompt[[1, 0]], prompt[:, :5])[:, 60:]
        assert torch.allclose(logits, wanted, atol=2e-4)
