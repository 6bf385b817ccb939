"""Host memory that is taken ahead, on a thread, by a device for which that takes long."""

import threading

import pytest
import torch

from headinfer.attend.reference import ReferenceKernel
from headinfer.device.cpu import CpuDevice
from headinfer.engine.engine import Engine
from headinfer.engine.stats import Stats
from headinfer.errors import MemoryPlanError
from headinfer.plan.options import Options
from headinfer.plan.plan import resolve
from shapes import model_shape

LAYERS = 4
SECONDS = 20
"""Until a wait that should end is given up."""


class LockingDevice(CpuDevice):
    """Notes who asks for memory; layer `held` must wait for it, layer `refused` gets none."""

    locks_host_memory = True

    def __init__(self, held: int | None = None, refused: int | None = None) -> None:
        self.asking: list[threading.Thread] = []
        self.held, self.refused = held, refused
        self.reached, self.released = threading.Event(), threading.Event()

    def host_empty(self, num_bytes: int) -> torch.Tensor:
        layer_idx = len(self.asking)
        self.asking.append(threading.current_thread())
        if layer_idx == self.held:
            self.reached.set()
            assert self.released.wait(SECONDS)
        if layer_idx == self.refused:
            raise MemoryPlanError("no memory for this layer")
        return super().host_empty(num_bytes)


def make_engine(device: CpuDevice) -> Engine:
    shape = model_shape(layers=LAYERS, kv_heads=2)
    plan = resolve(shape, Options.parse(), device="cpu", context_tokens=9)
    engine = Engine(device, plan, torch.float32, Stats())
    engine.expect(9)
    return engine


def attend(engine: Engine, layer_idx: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(layer_idx)
    query = torch.randn(1, 2, 3, 5, 8, generator=generator)
    keys, values = (torch.randn(1, 2, 5, 8, generator=generator) for _ in range(2))
    return engine.attend(layer_idx, query, keys, values, kernel=ReferenceKernel(), scale=0.3)


def test_a_layer_is_attended_while_memory_for_the_next_ones_is_taken():
    device = LockingDevice(held=1)
    ahead, plain = make_engine(device), make_engine(CpuDevice())
    for layer_idx in range(LAYERS):
        assert torch.equal(attend(ahead, layer_idx), attend(plain, layer_idx))
        if layer_idx == 0:
            assert device.reached.wait(SECONDS)  # the next layer's memory is being taken
            device.released.set()
    assert ahead.host_kv_bytes == plain.host_kv_bytes > 0
    assert device.asking[0] is threading.current_thread()
    (other,) = set(device.asking[1:])
    other.join(SECONDS)
    assert not other.is_alive()


def test_a_layer_that_gets_no_memory_fails_when_its_turn_comes():
    engine = make_engine(LockingDevice(refused=2))
    for layer_idx in range(2):
        attend(engine, layer_idx)
    with pytest.raises(MemoryPlanError, match="no memory for this layer"):
        attend(engine, 2)
    engine.close()
    assert engine.host_kv_bytes == 0


def test_closing_waits_for_the_layer_in_work_and_begins_no_other():
    device = LockingDevice(held=1)
    engine = make_engine(device)
    attend(engine, 0)
    assert device.reached.wait(SECONDS)
    releasing = threading.Timer(0.2, device.released.set)
    releasing.start()
    engine.close()
    assert device.released.is_set()
    assert len(device.asking) == 2
    assert engine.host_kv_bytes == 0
    device.asking[1].join(SECONDS)
    releasing.join()
