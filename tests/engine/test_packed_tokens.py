"""Packed tokens in host memory: every bit comes back, and no copy overtakes another one."""

import platform
import random
import threading
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attended import reference
from headinfer.device.base import Edge
from headinfer.device.hazards import HazardError
from headinfer.device.simulated import SimulatedDevice
from headinfer.disk.file import SpillFile
from headinfer.engine.engine import Engine
from headinfer.engine.stats import Stats
from headinfer.kv.pair import KV
from packed_values import bits_of
from packing_engines import (
    LateDevice,
    answer_plan,
    at_home,
    new_tokens,
    packing_engine,
    residents_of,
)

SLOW = pytest.mark.slow
KINDS = ("normal", "any bits", "special")


class Plain:
    """A cache of plain tensors beside an engine that packs."""

    def __init__(self, engine: Engine, batch: int, file: SpillFile | None = None) -> None:
        self.engine, self.batch, self.file = engine, batch, file
        self.kv = new_tokens("zeros", 0, 0, batch)

    def another(self) -> Engine:
        """Return an empty engine that is like ours."""
        engine = self.engine
        return Engine(engine.device, engine.plan, torch.bfloat16, Stats(), file=self.file)

    def append(self, tokens: int, kind: str) -> None:
        new = new_tokens(kind, tokens, self.kv.tokens, self.batch)
        self.engine.append(0, *(part.to(self.engine.device.torch_device) for part in new))
        self.kv = KV(*(torch.cat(parts, 2) for parts in zip(self.kv, new, strict=True)))

    def crop(self, tokens: int, _kind: str) -> None:
        kept = max(self.kv.tokens - tokens, 0)
        self.engine.crop(0, tokens)
        self.kv = self.kv.cut(slice(0, kept))

    def select(self, _tokens: int, _kind: str) -> None:
        rows = list(reversed(range(self.batch)))
        self.engine.select(0, rows)
        self.kv = KV(*(part[rows] for part in self.kv))

    def replan(self, _tokens: int, _kind: str) -> None:
        self.engine.replan(self.engine.plan)

    def answer(self, tokens: int, _kind: str) -> None:
        """Go on under a plan for an answer, or for prompts again; the host's pages stay."""
        engine, before = self.engine, at_home(self.engine)
        room, slots = engine.plan.raw_room, engine._raw
        if engine.plan.prompt_plan is None:
            assert engine.begin_answer(answer_plan(engine.plan, 64 * (1 + tokens // 64)))
        else:
            engine.end_answer()
            assert engine.plan.prompt_plan is None
        assert engine.plan.raw_room == room
        assert engine._raw is slots
        after = at_home(engine)
        assert len(before) == len(after)
        assert all(map(torch.equal, before, after))
        if engine.plan.resident_tokens:
            kept = self.kv.cut(slice(0, engine.plan.resident_tokens))
            for there, wanted in zip(residents_of(engine), kept, strict=True):
                assert torch.equal(bits_of(there.cpu()), bits_of(wanted))

    def fork(self, _tokens: int, _kind: str) -> None:
        """Go on with a copy, while whoever shares its host memory goes on as well."""
        before = engine = self.engine
        self.engine = self.another()
        self.engine.copy_from(before)
        new = new_tokens("any bits", 30, 1, self.batch)
        before.append(0, *(part.to(engine.device.torch_device) for part in new))
        self.check()

    def save(self, _tokens: int, _kind: str) -> None:
        """Go on with tokens that were copied out, in two pages, and in again."""
        engine, tokens = self.engine, self.kv.tokens
        engine.begin_saving()
        self.engine = self.another()
        self.engine.expect(tokens)
        for start, end in ((0, tokens // 3), (tokens // 3, tokens)):
            page = new_tokens("zeros", end - start, 0, self.batch)
            engine.copy_page(start, [page])
            self.engine.take_page([page])
        self.engine.end_loading()

    def check(self) -> None:
        for part, wanted in zip(("keys", "values"), self.kv, strict=True):
            assert torch.equal(bits_of(self.engine.read(0, part).cpu()), bits_of(wanted))


CHANGES = ("append", "append", "append", "crop", "select", "replan", "fork", "save", "answer")
changes = st.lists(
    st.tuples(st.sampled_from(CHANGES), st.integers(1, 150), st.sampled_from(KINDS)), max_size=7
)


def check_changes(
    steps: list[tuple[str, int, str]],
    batch: int,
    chunk_tokens: int,
    residents: int,
    file: SpillFile | None,
) -> None:
    device, on_disk = SimulatedDevice(seed=len(steps)), []
    engine = packing_engine(
        device, batch=batch, chunk_tokens=chunk_tokens, residents=residents, file=file
    )
    cache = Plain(engine, batch, file)
    for name, tokens, kind in [("append", 90, "any bits"), *steps, ("append", 70, "normal")]:
        getattr(cache, name)(tokens, kind)
        cache.check()
        on_disk.append(cache.engine.disk_tokens)
    assert any(on_disk) is (file is not None)
    device.memory.check()


every = given(
    changes,
    st.integers(1, 2),
    st.sampled_from([5, 24, 130]),
    st.sampled_from([0, 70]),
    st.none(),
)
test_every_bit_comes_back = settings(max_examples=12, deadline=None)(every(check_changes))
test_every_bit_comes_back_from_many = pytest.mark.slow(
    settings(max_examples=200, deadline=None)(every(check_changes))
)


@pytest.mark.parametrize("seed", [*range(4), *(pytest.param(n, marks=SLOW) for n in range(4, 60))])
def test_every_bit_comes_back_from_a_disk(tmp_path: Path, seed: int) -> None:
    """Above a disk blocks have a page, or few: most tokens lie there, and raw pages in memory."""
    draw, file = random.Random(seed), SpillFile(str(tmp_path))
    steps = [(draw.choice(CHANGES), draw.randrange(1, 150), draw.choice(KINDS)) for _ in range(5)]
    before = [("append", 200, "any bits"), ("append", 150, "special")]
    sizes = draw.choice([1, 2]), draw.choice([24, 130]), draw.choice([0, 70])
    check_changes([*before, *steps], *sizes, file)
    file.close()


def check_late_counts(steps: list[tuple[int, str]], stage: int, chance: float) -> None:
    layers = range(3)
    engine = packing_engine(LateDevice(len(steps), chance), layers=len(layers), stage=stage)
    room = engine.plan.raw_page_bytes
    block_bytes = engine.plan.raw_room.num_bytes // engine.plan.raw_room.blocks
    appended: list[list[KV]] = [[] for _ in layers]
    for tokens, kind in [(130, "normal"), *steps, (1, "normal")]:
        for layer_idx in layers:
            new = new_tokens(kind, tokens, 8 * len(appended[layer_idx]) + layer_idx)
            engine.append(layer_idx, *new)
            appended[layer_idx].append(new)
        if all(kind == "normal" for _, kind in steps):
            spare_blocks = engine.plan.raw_room.blocks - 1 if chance == 1 else 0
            assert engine._raw_page_bytes <= room - spare_blocks * block_bytes
    for layer_idx in layers:
        for part in ("keys", "values"):
            wanted = torch.cat([getattr(new, part) for new in appended[layer_idx]], 2)
            assert torch.equal(bits_of(engine.read(layer_idx, part)), bits_of(wanted))


late = given(
    st.lists(st.tuples(st.integers(1, 150), st.sampled_from(KINDS)), max_size=6),
    st.integers(0, 2),
    st.sampled_from([0.0, 0.2, 1.0]),
)
test_every_bit_comes_back_however_late_pages_are_counted = settings(max_examples=20, deadline=None)(
    late(check_late_counts)
)
test_every_bit_comes_back_however_late_many_pages_are_counted = pytest.mark.slow(
    settings(max_examples=400, deadline=None)(late(check_late_counts))
)


@pytest.mark.parametrize("chance", [0.0, 1.0])
def test_pages_that_pack_take_no_more_memory_than_is_set_aside(chance: float) -> None:
    for stage in range(3):
        check_late_counts([(n, "normal") for n in (70, 64, 24, 200)], stage, chance)


@pytest.mark.skipif(platform.system() != "Linux", reason="no list of threads")
def test_a_page_is_saved_in_the_background_by_one_thread() -> None:
    """Many would wait for each other, and for those that compute."""
    engine, counts = packing_engine(SimulatedDevice(seed=0)), []
    cache = Plain(engine, 1)
    cache.append(256, "normal")
    engine.begin_saving()
    page = new_tokens("zeros", 256, 0)

    def save() -> None:
        for _ in range(2):
            counts.append(len(list(Path("/proc/self/task").iterdir())))
            engine.copy_page(0, [page])

    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        engine.copy_page(0, [page])  # nothing is compiled there
        thread = threading.Thread(target=save)
        thread.start()
        thread.join()
    finally:
        torch.set_num_threads(before)
    assert counts[0] == counts[1]
    assert all(map(torch.equal, page, cache.kv))


@pytest.mark.gpu
def test_every_bit_comes_back_from_a_gpu() -> None:
    from headinfer.device.cuda import CudaDevice

    for chunk_tokens, residents, batch in ((24, 0, 1), (130, 70, 2)):
        device = CudaDevice(torch.device("cuda"))
        engine = packing_engine(device, batch=batch, chunk_tokens=chunk_tokens, residents=residents)
        cache = Plain(engine, batch)
        for kind in KINDS * 3:
            for name, tokens in (("append", 150), ("crop", 30), ("append", 77)):
                getattr(cache, name)(tokens, kind)
                cache.check()
        for name in ("select", "replan", "answer", "fork", "answer", "save", "answer"):
            getattr(cache, name)(0, "normal")
            cache.check()
            cache.append(70, "any bits")
            cache.check()


def go_on(device: SimulatedDevice) -> None:
    """Keep tokens with none attended between, and attend to tiles while others go home."""
    engine = packing_engine(device)
    for tokens in (20, 30, 7, 64):
        engine.append(0, *new_tokens("normal", tokens, tokens))
    engine = packing_engine(device)
    for tokens in (50, 1, 1, 24, 5, 9):
        keys, values = new_tokens("normal", tokens, tokens)
        engine.attend(0, keys, keys, values, kernels=reference(), scale=1.0)
    engine.close()


@pytest.mark.parametrize("edge", [Edge.PAGES_SENT, Edge.PAGES_READ])
def test_a_missing_wait_for_a_page_that_is_packed_anew_is_noticed(edge: Edge) -> None:
    go_on(whole := SimulatedDevice(seed=1))
    assert edge in whole.exercised_edges
    with pytest.raises(HazardError, match="is not ordered after the"):
        go_on(SimulatedDevice(seed=1, skip=[edge]))
