"""Layers with a window: what they hold is bounded, and what they forgot is not taken back."""

import pytest
import torch

from headinfer.attend.reference import ReferenceKernel
from headinfer.device.cpu import CpuDevice
from headinfer.device.simulated import SimulatedDevice
from headinfer.engine.engine import Engine
from headinfer.engine.stats import Stats
from headinfer.errors import CacheStateError
from headinfer.plan.options import Options
from headinfer.plan.plan import resolve
from shapes import model_shape

WINDOW = 20


def engine_with_window(device: CpuDevice | SimulatedDevice) -> Engine:
    shape = model_shape(layers=1, window_tokens=WINDOW)
    plan = resolve(shape, Options(chunk_tokens=64, tile_tokens=16), device=device.name)
    return Engine(device, plan, torch.float32, Stats())


def attend(engine: Engine, tokens: int) -> torch.Tensor:
    new = torch.randn(1, 2, tokens, 8)
    query = new.unsqueeze(2).expand(1, 2, 2, tokens, 8)
    return engine.attend(0, query, new, new, kernel=ReferenceKernel(), scale=1.0)


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
    attend(engine, 100)
    with pytest.raises(CacheStateError, match="30 tokens cannot be taken back"):
        engine.crop(0, 30)
    assert engine.tokens(0) == 100
    engine.crop(0, 100)
    assert engine.tokens(0) == 0


def test_a_window_that_records_can_take_back_what_came_since_the_last_crop() -> None:
    engine = engine_with_window(CpuDevice())
    attend(engine, 100)
    engine.record(0)
    attend(engine, 50)
    engine.crop(0, 50)
    assert engine.tokens(0) == 100
    attend(engine, 50)
    engine.crop(0, 0)
    attend(engine, 50)
    with pytest.raises(CacheStateError, match="90 tokens cannot be taken back"):
        engine.crop(0, 90)
