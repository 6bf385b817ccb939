"""Memory for pages that do not pack: where it lacks, is interrupted, or is needed no more."""

import weakref

import pytest
import torch

from headinfer.device.simulated import SimulatedDevice
from headinfer.engine import raw_pages
from headinfer.engine.engine import Engine
from headinfer.errors import MemoryPlanError
from headinfer.kv.pair import KV
from packed_values import bits_of
from packing_engines import LateDevice, new_tokens, packing_engine


class Scarce(SimulatedDevice):
    """A simulated device whose host has no memory of some size left, once it is told so."""

    lacks_bytes = 0

    def host_empty(self, num_bytes: int) -> torch.Tensor:
        if num_bytes == self.lacks_bytes:
            raise MemoryPlanError(f"no {num_bytes} bytes")
        return super().host_empty(num_bytes)


def block_bytes(engine: Engine) -> int:
    room = engine.plan.raw_room
    return room.num_bytes // room.blocks


def check(engine: Engine, *parts: KV) -> None:
    for at, part in enumerate(("keys", "values")):
        wanted = torch.cat([new[at] for new in parts], 2)
        assert torch.equal(bits_of(engine.read(0, part)), bits_of(wanted))


@pytest.mark.parametrize("residents", [0, 256])
def test_tokens_stay_where_they_are_that_no_memory_was_left_for(residents: int) -> None:
    device = Scarce(seed=1)
    engine = packing_engine(device, chunk_tokens=64, residents=residents)
    first, second, third = (new_tokens("any bits", tokens, tokens) for tokens in (30, 64, 65))
    engine.append(0, *first)
    device.lacks_bytes = block_bytes(engine)
    with pytest.raises(MemoryPlanError):
        engine.append(0, *second)
    device.lacks_bytes = 0
    assert engine.lengths() == [94]  # on the device they are
    check(engine, first, second)
    engine.append(0, *third)
    check(engine, first, second, third)


def test_counts_are_waited_for_where_memory_for_another_block_lacks() -> None:
    device = LateDevice(1, 0.0)
    engine = packing_engine(device, chunk_tokens=64, stage=2)
    new = [new_tokens("normal", 64, seed) for seed in range(7)]
    engine.append(0, *new[0])
    assert engine.plan.raw_room.blocks > 1
    took, block = [], raw_pages.Block

    def no_other(*_given: object) -> raw_pages.Block:
        took.append(1)
        raise MemoryPlanError("no memory for a block")

    raw_pages.Block = no_other
    try:
        for each in new[1:]:
            engine.append(0, *each)
    finally:
        raw_pages.Block = block
    assert took
    check(engine, *new)


@pytest.mark.parametrize("where", [(raw_pages.RawPages, "note"), (raw_pages.Block, "was_counted")])
def test_slots_that_an_interruption_left_uncounted_are_not_taken_again(
    where: tuple[type, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = packing_engine(LateDevice(1, 0.0), chunk_tokens=64)

    def interrupted(*_given: object) -> None:
        raise KeyboardInterrupt

    def go_on(seeds: range) -> list[KV]:
        new = [new_tokens("any bits", 64, seed) for seed in seeds]
        for each in new:
            engine.append(0, *each)
        return new

    with monkeypatch.context() as patched:
        patched.setattr(*where, interrupted)
        with pytest.raises(KeyboardInterrupt):
            go_on(range(9))
    engine.clear()
    check(engine, *go_on(range(10, 18)))


def test_an_empty_cache_holds_no_block() -> None:
    engine = packing_engine(LateDevice(1, 0.0), stage=2)
    for seed in range(20):
        engine.append(0, *new_tokens("any bits", 24, seed))
    blocks = [weakref.ref(raw) for raw in engine._full[0].raw_memory]
    assert blocks
    engine.clear()
    assert not any(block() is not None for block in blocks)
    assert engine.host_kv_bytes == 0


@pytest.mark.parametrize("kind", ["normal", "any bits"])
def test_a_parked_cache_holds_no_block_that_no_page_lies_in(kind: str) -> None:
    engine = packing_engine(LateDevice(1, 0.0), stage=2)
    new = [new_tokens(kind, 64, seed) for seed in range(8)]
    for each in new:
        engine.append(0, *each)
    engine.park()
    assert (engine._raw_page_bytes >= block_bytes(engine)) is (kind == "any bits")
    check(engine, *new)
    engine.replan(engine.plan)
    engine.append(0, *new[0])
    check(engine, *new, new[0])
