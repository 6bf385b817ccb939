"""Engines whose tokens are packed in host memory, and a device that is late with its counts."""

import random
from dataclasses import replace

import torch

from headinfer.device.base import Device
from headinfer.device.simulated import SimulatedDevice
from headinfer.disk.file import SpillFile
from headinfer.engine.disk_tiles import in_memory
from headinfer.engine.engine import Engine
from headinfer.engine.stats import Stats
from headinfer.kv.pair import KV
from headinfer.plan.below_host import in_few_blocks
from headinfer.plan.memory import chunk_page_bytes, packed_bytes
from headinfer.plan.options import Options
from headinfer.plan.plan import Plan
from headinfer.plan.residents import with_residents
from headinfer.plan.resolve import resolve
from packed_values import drawn
from shapes import model_shape

KEY_DIM, VALUE_DIM = 16, 32


def packing_engine(
    device: Device,
    *,
    batch: int = 1,
    chunk_tokens: int = 24,
    residents: int = 0,
    file: SpillFile | None = None,
    layers: int = 1,
    stage: int = 0,
) -> Engine:
    shape = model_shape(layers=layers, group=1, key_dim=KEY_DIM, value_dim=VALUE_DIM, itemsize=2)
    shape = replace(shape, stage=stage)
    options = Options(chunk_tokens=chunk_tokens, tile_tokens=16, resident_tokens=residents)
    plan = resolve(shape.packed, options, device=device.name, batch=batch)
    assert plan.shape.packs
    if file is not None:
        plan = replace(in_few_blocks(plan), disk_host_blocks=2)
    return Engine(device, plan, torch.bfloat16, Stats(), file=file)


def answer_plan(plan: Plan, residents: int) -> Plan:
    """Return a plan for an answer as `answering` makes it, with some resident tokens."""
    chunk_tokens = plan.page_tokens + 1
    sizes = {"chunk_tokens": chunk_tokens, "batch": plan.batch}
    short = replace(
        plan,
        prompt_plan=plan,
        chunk_tokens=chunk_tokens,
        chunk_page_bytes=chunk_page_bytes(plan.shape, **sizes),
        packed_bytes=packed_bytes(plan.shape, **sizes),
    )
    return with_residents(short, residents)


def at_home(engine: Engine) -> list[torch.Tensor]:
    """Return a copy of the pages of all layers in host memory, and of those that did not pack."""
    engine.begin_saving()  # the host has all tokens
    found = []
    for ledger in engine._full:
        for tile in map(in_memory, ledger.host_tiles(0, ledger.host_tokens)):
            found += [*map(torch.clone, tile.kv), *map(torch.clone, tile.piece.raw)]
    return found


def residents_of(engine: Engine) -> KV:
    """Return the first layer's resident tokens where they lie, once compute may read them."""
    resident = engine._full[0].resident
    assert resident is not None
    resident.piece.wait_ready(engine.device)
    engine.device.compute.reads(resident.piece.memory, "a test")
    return resident.tile(0, resident.tokens).kv


def new_tokens(kind: str, tokens: int, seed: int, batch: int = 1) -> KV:
    dims = KEY_DIM, VALUE_DIM
    return KV(*(drawn(kind, (batch, 2, tokens, dim), seed * 2 + at) for at, dim in enumerate(dims)))


class LateMark:
    """A mark that is reached by chance, or once it is waited for: what was counted is there then.

    Args:
        chance: that it is, each time somebody looks.
        draw: draws that.
        counts: numbers that the device has written, and the memory of the host that takes them.
    """

    def __init__(
        self, chance: float, draw: random.Random, counts: list[tuple[torch.Tensor, torch.Tensor]]
    ) -> None:
        self._chance, self._draw = chance, draw
        self._counts = [(number.clone(), memory) for number, memory in counts]

    @property
    def reached(self) -> bool:
        if self._draw.random() >= self._chance:
            return False
        self.wait()
        return True

    def wait(self) -> None:
        for number, memory in self._counts:
            memory.copy_(number)


class LateDevice(SimulatedDevice):
    """A simulated device whose single numbers come to the host as late as its marks."""

    def __init__(self, seed: int, chance: float) -> None:
        super().__init__(seed=seed)
        self._chance, self._draw = chance, random.Random(seed)
        self._counts: list[tuple[torch.Tensor, torch.Tensor]] = []

    def mapped(self, memory: torch.Tensor) -> torch.Tensor:
        if memory.numel() != 8:
            return memory
        self._counts.append((memory.clone(), memory))
        return self._counts[-1][0]

    def mark_compute(self) -> LateMark:
        return LateMark(self._chance, self._draw, self._counts)
