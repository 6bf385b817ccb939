"""Tokens in 8 bits in host memory: rounded once, whichever way they come."""

import platform
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from eight_bit_values import drawn, keep_raw, unpacked
from headinfer.device.base import Edge
from headinfer.device.hazards import HazardError
from headinfer.device.simulated import SimulatedDevice
from headinfer.eight_bits.reference import pack
from headinfer.engine.engine import Engine
from headinfer.engine.stats import Stats
from headinfer.kv.pair import KV
from headinfer.plan.format import Format
from headinfer.plan.options import Options
from headinfer.plan.resolve import resolve
from packing_engines import answer_plan, at_home, residents_of
from shapes import model_shape

KEY_DIM, VALUE_DIM, TOKENS = 16, 32, 250
FORMS = (Format.INT8, Format.FP8)


def engine_of(
    form: Format,
    *,
    dtype: torch.dtype = torch.bfloat16,
    chunk_tokens: int = 24,
    residents: int = 0,
    skip: Sequence[Edge] = (),
) -> Engine:
    shape = model_shape(
        layers=1, group=1, key_dim=KEY_DIM, value_dim=VALUE_DIM, itemsize=dtype.itemsize
    )
    options = Options(chunk_tokens=chunk_tokens, tile_tokens=16, resident_tokens=residents)
    plan = resolve(shape.stored_as(form), options, device="simulated", batch=1)
    engine = Engine(SimulatedDevice(seed=chunk_tokens, skip=skip), plan, dtype, Stats())
    engine.expect(TOKENS)  # in one piece of memory
    return engine


def tokens_of(count: int, dtype: torch.dtype = torch.bfloat16) -> KV:
    dims = KEY_DIM, VALUE_DIM
    return KV(*(drawn("outliers", (1, 2, count, dim), at, dtype) for at, dim in enumerate(dims)))


def rounded(form: Format, kv: KV) -> KV:
    """What one rounding of all full pages gives."""
    code, found = form.code, []
    assert code is not None
    for values in kv:
        pages = pack(code, values)
        kept = keep_raw(code, pages, values)
        found.append(unpacked(code, pages, values))
        del kept
    return KV(*found)


def read(engine: Engine) -> KV:
    engine.begin_saving()  # the host has all tokens
    return KV(engine.read(0, "keys"), engine.read(0, "values"))


def append(engine: Engine, kv: KV, counts: Sequence[int]) -> None:
    start = 0
    for count in counts:
        engine.append(0, *kv.cut(slice(start, start + count)))
        start += count


@settings(max_examples=12, deadline=None)
@given(
    st.sampled_from(FORMS),
    st.lists(st.integers(1, 60), min_size=1, max_size=9),
    st.sampled_from([5, 24, 130]),
    st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
)
def test_tokens_that_come_in_many_calls_are_those_of_one(
    form: Format, counts: list[int], chunk_tokens: int, dtype: torch.dtype
) -> None:
    """A page that is not full is as it was computed, and nothing is rounded twice."""
    total = min(sum(counts), TOKENS)
    kv, engine = tokens_of(total, dtype), engine_of(form, dtype=dtype, chunk_tokens=chunk_tokens)
    while sum(counts) > TOKENS:
        counts.pop()
    append(engine, kv, [*counts, total - sum(counts)][: len(counts) + (total > sum(counts))])
    assert all(map(torch.equal, read(engine), rounded(form, kv)))


@pytest.mark.parametrize("form", FORMS)
def test_one_token_after_another(form: Format) -> None:
    kv, engine = tokens_of(TOKENS), engine_of(form)
    append(engine, kv, [1] * TOKENS)
    assert all(map(torch.equal, read(engine), rounded(form, kv)))


@pytest.mark.parametrize("form", FORMS)
def test_numbers_that_are_not_finite_come_back(form: Format) -> None:
    kv, engine = tokens_of(TOKENS), engine_of(form)
    kv.keys[0, 1, 70, 2], kv.values[0, 0, 3, 5] = torch.inf, torch.nan
    append(engine, kv, [100, 150])
    found = read(engine)
    assert torch.equal(found.keys[0, 1, 64:128], kv.keys[0, 1, 64:128])
    assert torch.equal(found.values[0, 0, :64].nan_to_num(7), kv.values[0, 0, :64].nan_to_num(7))
    assert found.keys[0, 0].isfinite().all()


@pytest.mark.parametrize("form", FORMS)
def test_tokens_go_on_after_a_crop_a_fork_and_a_load(form: Format) -> None:
    """What a crop leaves of a page stays as it reads until the page is full again."""
    kv, engine = tokens_of(TOKENS), engine_of(form, residents=30)
    append(engine, kv, [200])
    before = read(engine)
    engine.crop(0, 50)
    append(engine, kv, [20])
    found = read(engine)
    for got, old, new in zip(found, before, kv, strict=True):
        assert torch.equal(got, torch.cat([old[:, :, :150], new[:, :, :20]], 2))
    fork = Engine(engine.device, engine.plan, torch.bfloat16, Stats())
    fork.copy_from(engine)
    append(engine, kv, [60])
    assert all(map(torch.equal, read(fork), found))
    loaded = engine_of(form)
    page = KV(*(torch.empty_like(part) for part in found))
    fork.copy_page(0, [page])
    assert all(map(torch.equal, page, found))
    loaded.take_page([page])
    loaded.end_loading()
    assert all(map(torch.equal, read(loaded), rounded(form, page)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("form", FORMS)
def test_an_answer_rounds_nothing_anew(form: Format, dtype: torch.dtype) -> None:
    """Its residents are what the host has: full pages rounded once, the last one as it is."""
    kv, engine = tokens_of(TOKENS, dtype), engine_of(form, dtype=dtype, residents=70)
    append(engine, kv, [100, 70])
    assert all(map(torch.equal, residents_of(engine), kv.cut(slice(0, 70))))
    home = at_home(engine)
    engine.begin_answer(answer_plan(engine.plan, 192))
    assert all(map(torch.equal, at_home(engine), home))
    assert all(map(torch.equal, residents_of(engine), rounded(form, kv.cut(slice(0, 170)))))
    append(engine, kv.cut(slice(170, TOKENS)), [1] * 50)
    found, home = read(engine), at_home(engine)
    assert all(map(torch.equal, found, rounded(form, kv.cut(slice(0, 220)))))
    engine.end_answer()
    assert all(map(torch.equal, at_home(engine), home))
    assert all(map(torch.equal, residents_of(engine), found.cut(slice(0, 70))))
    append(engine, kv.cut(slice(220, TOKENS)), [30])
    assert all(map(torch.equal, read(engine), rounded(form, kv)))


@pytest.mark.parametrize("form", [Format.PACKED, *FORMS])
def test_parking_keeps_no_block_of_raw_pages_more(form: Format) -> None:
    kv, engine = tokens_of(TOKENS), engine_of(form, chunk_tokens=130)
    append(engine, kv.cut(slice(0, 200)), [130, 70])
    most = engine.host_kv_bytes
    for turn in range(10):
        engine.park()
        engine.replan(engine.plan)
        append(engine, kv.cut(slice(200 + turn, TOKENS)), [1])
    assert engine.host_kv_bytes <= most


@pytest.mark.parametrize("form", [Format.PACKED, *FORMS])
def test_copies_count_the_raw_pages_that_they_share_once(form: Format) -> None:
    engine = engine_of(form)
    append(engine, tokens_of(192), [130, 62])
    engine.park()
    fork = Engine(engine.device, engine.plan, engine.dtype, Stats(), parked=True)
    fork.copy_from(engine)
    pieces = engine.host_pieces()
    assert sum(pieces.values()) == engine.host_kv_bytes
    assert sum((pieces | fork.host_pieces()).values()) == engine.host_kv_bytes


@pytest.mark.parametrize("form", [Format.PACKED, *FORMS])
def test_passes_that_end_within_a_page_leave_no_copies_behind(form: Format) -> None:
    """Nothing packs here, and a page that is not full has a copy of itself, time and again."""
    engine, bits = engine_of(form, chunk_tokens=130), torch.Generator().manual_seed(0)
    for tokens in (130, *[3] * 40):  # each of these goes home within a page
        drawn_bits = [
            torch.randint(-(2**15), 2**15, (1, 2, tokens, dim), generator=bits, dtype=torch.int32)
            for dim in (KEY_DIM, VALUE_DIM)
        ]
        engine.append(0, *(each.short().view(torch.bfloat16) for each in drawn_bits))
        engine.begin_saving()
        assert engine.host_kv_bytes <= engine.plan.kv_host_bytes(TOKENS + 64)


@pytest.mark.parametrize("form", [Format.PACKED, *FORMS])
def test_a_copy_leaves_a_cache_the_memory_that_it_reserved(form: Format) -> None:
    kv, engine = tokens_of(TOKENS), engine_of(form)
    append(engine, kv, [100])
    fork = Engine(engine.device, engine.plan, engine.dtype, Stats())
    fork.copy_from(engine)
    forked, reserved = read(fork), set(engine.host_pieces())
    append(engine, kv.cut(slice(100, TOKENS)), [20, 130])
    wanted = kv if form is Format.PACKED else rounded(form, kv)
    assert all(map(torch.equal, read(engine), wanted))
    assert all(map(torch.equal, read(fork), forked))
    assert len(engine.host_pieces().keys() - reserved) <= 1, "a block of pages that do not pack"


def test_a_page_that_is_read_before_it_was_kept_is_noticed() -> None:
    """The log of accesses knows the copies of pages that are not full."""
    engine = engine_of(Format.INT8, skip=(Edge.HOST_SETTLED,))
    append(engine, tokens_of(100), [100])
    engine.begin_saving()
    with pytest.raises(HazardError, match=r"not ordered after the .*pages as they are"):
        engine.copy_page(0, [tokens_of(100)])
    engine.device.synchronize()
    engine.device.skipped_edges = frozenset()  # or its end would fail as well


@pytest.mark.skipif(platform.system() != "Linux", reason="no list of threads")
@pytest.mark.parametrize("form", FORMS)
def test_a_page_is_saved_in_the_background_by_one_thread(form: Format) -> None:
    """Many would wait for each other, and for those that compute."""
    engine, counts, given = engine_of(form, chunk_tokens=600), [], tokens_of(1117)
    engine.expect(1117)
    append(engine, given, [1117])
    engine.begin_saving()
    page = KV(*map(torch.zeros_like, given))

    def save() -> None:
        for _ in range(2):
            counts.append(len(list(Path("/proc/self/task").iterdir())))
            engine.copy_page(0, [page])

    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        thread = threading.Thread(target=save)
        thread.start()
        thread.join()
    finally:
        torch.set_num_threads(before)
    assert counts[0] == counts[1]
    assert all(map(torch.equal, page, rounded(form, given)))
