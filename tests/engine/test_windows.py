"""Layers with a window: what they hold is bounded, and what they forgot is not taken back."""

import pytest
import torch

from attended import reference
from headinfer.device.cpu import CpuDevice
from headinfer.device.simulated import SimulatedDevice
from headinfer.engine.engine import Engine
from headinfer.engine.stats import Stats
from headinfer.errors import CacheStateError
from headinfer.plan.memory import SPARE_TOKENS
from headinfer.plan.options import Options
from headinfer.plan.resolve import resolve
from shapes import model_shape

WINDOW = 20


def engine_with_window(device: CpuDevice | SimulatedDevice) -> Engine:
    shape = model_shape(layers=1, window_tokens=WINDOW)
    plan = resolve(shape, Options(chunk_tokens=64, tile_tokens=16), device=device.name)
    return Engine(device, plan, torch.float32, Stats())


def attend(engine: Engine, tokens: int) -> torch.Tensor:
    new = torch.randn(1, 2, tokens, 8)
    query = new.repeat_interleave(2, dim=1)
    return engine.attend(0, query, new, new, kernels=reference(), scale=1.0, window_tokens=WINDOW)


@pytest.mark.parametrize("device", [CpuDevice(), SimulatedDevice()], ids=["cpu", "simulated"])
def test_memory_does_not_grow_with_the_context(device: CpuDevice | SimulatedDevice) -> None:
    engine = engine_with_window(device)
    held = []
    for _ in range(20):
        attend(engine, 50)
        for _ in range(70):
            attend(engine, 1)
        held.append(engine.device_kv_bytes)
    assert engine.tokens(0) == 20 * 120
    assert len(set(held)) == 1
    assert held[0] <= engine.plan.kv_device_bytes
    assert engine.host_kv_bytes == 0
    engine.close()
    assert engine.device_kv_bytes == 0


def test_what_a_window_dropped_cannot_be_taken_back() -> None:
    engine = engine_with_window(CpuDevice())
    attend(engine, 400)
    with pytest.raises(CacheStateError, match="300 tokens cannot be taken back"):
        engine.crop(0, 300)
    assert engine.tokens(0) == 400
    engine.crop(0, SPARE_TOKENS)
    assert engine.tokens(0) == 400 - SPARE_TOKENS
    with pytest.raises(CacheStateError, match="1 token cannot be taken back"):
        engine.crop(0, 1)
    engine.crop(0, 400)
    assert engine.tokens(0) == 0


@pytest.mark.parametrize("tokens", [1, 3, 60])
def test_as_many_tokens_as_are_spare_can_always_be_taken_back(tokens: int) -> None:
    engine = engine_with_window(CpuDevice())
    for _ in range(1000 // tokens):
        attend(engine, tokens)
        before = engine.tokens(0)
        if before > SPARE_TOKENS:
            engine.crop(0, SPARE_TOKENS)
            new = torch.randn(1, 2, SPARE_TOKENS, 8)
            engine.append(0, new, new)
        assert engine.tokens(0) == before
