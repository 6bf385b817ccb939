"""The Triton programs against the definition: on a GPU, or in Triton's interpreter without one."""

import importlib.util

import pytest
import torch
from test_kernels import SHAPES, check, draw

from attended import attended, reference
from headinfer.attend import slots
from headinfer.attend.partial import Partial
from headinfer.attend.reference import ReferenceKernel
from headinfer.attend.table import Kernels
from headinfer.attend.work import Kernel, TokenWork, Work, tile_in_hand
from headinfer.device.base import PlaceError
from headinfer.kv.pair import KV

if importlib.util.find_spec("triton") is None:
    pytest.skip("no Triton", allow_module_level=True)
from headinfer.attend.fused_decode import MAX_ROWS, Slots, TritonKernels, serves

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
pytestmark = [pytest.mark.gpu] if ON_GPU else []  # without one the interpreter serves
DTYPES = [torch.float32, torch.float16]
if ON_GPU:  # the interpreter multiplies the bits of bfloat16 as if they were integers
    DTYPES.append(torch.bfloat16)


class Refusing:
    """Stands for the other kernel where it must not be asked."""

    name = "refusing"

    def serves(self, _work):
        return True

    def attend(self, _work):
        raise AssertionError("the other kernel was asked")


def triton(other: Kernel | None = None, *, shared_bytes: int = 0) -> Kernels:
    return TritonKernels([other or Refusing()], [], multiprocessors=6, shared_bytes=shared_bytes)


@pytest.mark.covering(most=1)
@pytest.mark.parametrize("kind", ["tile", "padding"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_tile_by_definition(dtype, kind):
    for shape in SHAPES if ON_GPU or kind == "tile" else SHAPES[::2]:
        if serves(dtype, shape[-1]) and shape[2] * shape[3] <= MAX_ROWS:
            check(triton(), shape, dtype, kind, device=DEVICE)


@pytest.mark.covering(most=2)
@pytest.mark.parametrize(
    ("shape", "tile_tokens"),
    [
        ((2, 2, 3, 2, 32), [5]),
        ((2, 2, 3, 2, 32), [700, 1, 64, 300]),
        ((1, 1, 8, 8, 128), [3] * 70),  # more partials than are kept
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_tiles_partials_and_sinks_merge_like_the_reference(dtype, shape, tile_tokens, monkeypatch):
    monkeypatch.setattr(slots, "_SLOTS_BYTES", 2**21)
    batch, kv_heads, group, q_len, dim = shape
    query = draw(batch, q_len, kv_heads, group, dim, dtype=dtype).to(DEVICE)
    query = query.permute(0, 2, 3, 1, 4)  # as models hand it over
    sinks = draw(kv_heads, group, dtype=dtype).to(DEVICE)
    elsewhere = Partial(
        draw(batch, kv_heads, group, q_len, dim, dtype=dtype, seed=5).to(DEVICE),
        draw(batch, kv_heads, group, q_len, dtype=torch.float32, seed=6).to(DEVICE),
    )
    results = []
    for kernels in (triton(), reference()):
        total = kernels.begin(query, scale=0.3)
        out = torch.full((batch, q_len, kv_heads + 1, group, dim), 7.0, dtype=dtype, device=DEVICE)
        for seed, tokens in enumerate(tile_tokens):
            keys, values = (
                draw(batch, kv_heads, tokens + 9, dim, dtype=dtype, seed=seed + part).to(DEVICE)
                for part in (10, 11)
            )
            # A view with gaps between heads.
            tile = tile_in_hand(KV(keys[:, :, 9:], values[:, :, 9:]))
            work = Work(query, [tile], 0.3, total)
            kernels.pick(work).attend(work)
        total.add(elsewhere)
        total.add_sinks(sinks)
        total.write(out[:, :, :kv_heads])
        assert (out[:, :, kv_heads:] == 7).all()
        results.append(out)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(*results, rtol=tolerance, atol=tolerance)


@pytest.mark.covering
@pytest.mark.parametrize(
    ("shape", "tokens"),
    [
        ((1, 2, 4, 32), [1, 2, 63, 64, 65]),
        ((3, 2, 3, 80), [700]),
        ((1, 1, 16, 16), [1500]),
        ((1, 1, 17, 16), [90]),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_new_token_is_attended_and_kept_by_the_same_launch(dtype, shape, tokens):
    batch, kv_heads, group, dim = shape
    with_sinks = batch > 1
    sinks = draw(kv_heads, group, dtype=dtype, seed=9).to(DEVICE) if with_sinks else None
    # Whose memory and counters serve all of the calls; with little memory or much.
    one = triton(shared_bytes=0 if with_sinks else 2**20)
    for kv_len in tokens:
        query = draw(batch, 1, kv_heads, group, dim, dtype=dtype).to(DEVICE).permute(0, 2, 3, 1, 4)
        new = [
            draw(batch, 1, kv_heads, dim, dtype=dtype, seed=seed).to(DEVICE).transpose(1, 2)
            for seed in (1, 2)
        ]
        memory = [
            draw(batch, kv_heads, kv_len + 5, dim, dtype=dtype, seed=seed).to(DEVICE)
            for seed in (3, 4)
        ]
        results = []
        for kernels in (one, reference()):
            held = [part.clone() for part in memory]
            out = query.new_empty(batch, 1, kv_heads, group, dim)
            tile = tile_in_hand(KV(*held))._replace(tokens=kv_len)
            kernels.decode(TokenWork(query, KV(*new), tile, 0.2, out, sinks=sinks))
            results.append((out, held))
        tolerance = 1e-5 if dtype == torch.float32 else 1e-2
        torch.testing.assert_close(results[0][0], results[1][0], rtol=tolerance, atol=tolerance)
        for ours, wanted in zip(results[0][1], results[1][1], strict=True):
            assert torch.equal(ours, wanted)  # the new token is in its place, and nothing else is


@pytest.mark.covering
@pytest.mark.parametrize("from_memory", [False, True], ids=["given", "from memory"])
@pytest.mark.parametrize(("sinks", "first", "tokens"), [(4, 4, 9), (20, 33, 70), (7, 300, 260)])
def test_sinks_are_attended_wherever_the_window_begins(sinks, first, tokens, from_memory):
    dtype = torch.float32
    query, new = (draw(1, 2, size, 1, 32, dtype=dtype).to(DEVICE) for size in (3, 1))
    new = KV(new[:, :, 0], -new[:, :, 0])
    memory = [draw(1, 2, first + tokens + 5, 32, dtype=dtype, seed=seed) for seed in (3, 4)]
    whole = KV(*(part.to(DEVICE) for part in memory))
    tile = tile_in_hand(whole)._replace(first=first, tokens=tokens)
    out = query.new_empty(1, 1, 2, 3, 32)
    place = counters = None
    if from_memory:
        place = torch.tensor([first, tokens, sinks], device=DEVICE)
        counters = torch.zeros(2, dtype=torch.int32, device=DEVICE)
        tile = tile_in_hand(whole)
    triton().decode(TokenWork(query, new, tile, 0.2, out, None, sinks, place, counters))
    for part, token in zip(whole, new, strict=True):
        assert torch.equal(part[:, :, first + tokens - 1], token[:, :, 0])
    seen = [*range(sinks), *range(first, first + tokens)]
    keys, values = (part[:, :, seen] for part in whole)
    wanted = attended(reference(), query, keys, values, scale=0.2).out
    torch.testing.assert_close(out.permute(0, 2, 3, 1, 4), wanted, rtol=1e-5, atol=1e-5)
    again = query.new_empty(out.shape)
    reference().decode(
        TokenWork(
            query,
            new,
            tile_in_hand(whole)._replace(first=first, tokens=tokens),
            0.2,
            again,
            None,
            sinks,
        )
    )
    torch.testing.assert_close(again, out, rtol=1e-5, atol=1e-5)


def test_layouts_that_one_launch_does_not_serve_take_several():
    query, new = draw(1, 2, 2, 1, 16, dtype=torch.float32), draw(1, 2, 1, 16, dtype=torch.float32)
    keys, values = draw(1, 2, 9, 16, dtype=torch.float32), draw(1, 9, 2, 16, dtype=torch.float32)
    query, new, keys, values = (part.to(DEVICE) for part in (query, new, keys, values))
    results = []
    for kernels in (triton(), reference()):
        held, out = values.clone().transpose(1, 2), query.new_empty(1, 1, 2, 2, 16)
        tile = tile_in_hand(KV(keys.clone(), held))
        kernels.decode(TokenWork(query, KV(new, new), tile, 1.0, out))
        assert torch.equal(held[:, :, -1:], new)
        results.append(out)
    torch.testing.assert_close(*results)


def test_a_tile_is_read_right_at_any_address_stride_and_length():
    query = draw(1, 2, 2, 1, 32, dtype=torch.float16).to(DEVICE)
    memory = draw(2, 4 * 50 * 32 + 8, dtype=torch.float16).to(DEVICE)
    for tokens, offset, heads in [(40, 0, 2), (40, 1, 2), (33, 0, 2), (40, 8, 4), (1, 1, 4)]:
        keys, values = (
            part[offset : offset + heads * 50 * 32].view(1, heads, 50, 32)[:, :2, :tokens]
            for part in memory
        )
        ours = attended(triton(), query, keys, values, scale=1)
        wanted = attended(reference(), query, keys, values, scale=1.0)
        torch.testing.assert_close(ours.out.to(query.dtype), wanted.out, rtol=1e-2, atol=1e-2)
        torch.testing.assert_close(ours.lse, wanted.lse, rtol=1e-3, atol=1e-3)


def test_rows_that_see_nothing_weigh_nothing():
    query = draw(2, 1, 2, 1, 16, dtype=torch.float32).to(DEVICE)
    keys = draw(2, 1, 40, 16, dtype=torch.float32).to(DEVICE)
    mask = torch.ones(2, 1, 40, dtype=torch.bool, device=DEVICE)
    mask[1] = False
    partial = attended(triton(), query, keys, keys, scale=1.0, mask=mask)
    assert partial.lse[0].isfinite().all()
    assert (partial.lse[1] == -torch.inf).all()
    assert not partial.out[1].any()


def test_no_tile_at_all_is_zero():
    query = draw(1, 1, 2, 1, 16, dtype=torch.float32).to(DEVICE)
    out = torch.ones(1, 1, 1, 2, 16, device=DEVICE)
    total = triton().begin(query, scale=1.0)
    tile = tile_in_hand(KV(query[:, :, 0, :0], query[:, :, 0, :0]))
    triton().kernels[0].attend(Work(query, [tile], 1.0, total))
    total.write(out)
    assert not out.any()


@pytest.mark.parametrize("kind", ["causal", "mask"])
def test_what_the_programs_do_not_serve_goes_to_the_other_kernel(kind):
    other = triton(ReferenceKernel())
    for shape in [(1, 2, 2, 3, 20, 32), (1, 1, 4, 40, 90, 32)]:
        check(other, shape, torch.float32, kind, device=DEVICE)
        with pytest.raises(AssertionError, match="other kernel was asked"):
            check(triton(), shape, torch.float32, kind, device=DEVICE)
    check(other, (1, 1, 4, 40, 90, 32), torch.float32, "tile", device=DEVICE)


@pytest.mark.parametrize("dtype", [torch.float64, torch.int8])
def test_dtypes_without_programs_are_known(dtype):
    assert not serves(dtype, 64)
    assert serves(torch.bfloat16, 64)
    assert not serves(torch.bfloat16, 8)


@pytest.mark.covering(most=1)
@pytest.mark.parametrize("dtype", DTYPES)
def test_tiles_are_read_where_they_lie(dtype):
    """Some heads and tokens of memory that holds more: nothing is viewed or copied for a launch."""
    memory = KV(*(draw(2, 5, 700, 32, dtype=dtype, seed=seed).to(DEVICE) for seed in (1, 2)))
    whole, results = tile_in_hand(memory), []
    for heads in (slice(0, 5), slice(1, 3)):
        query = draw(2, heads.stop - heads.start, 2, 1, 32, dtype=dtype).to(DEVICE)
        parts = [(0, 0), (3, 600), (603, 1), (699, 1)]
        tiles = [whole._replace(first=at, tokens=n, heads=heads) for at, n in parts]
        results = []
        for kernels in (triton(), reference()):
            total, out = (
                kernels.begin(query, scale=0.3),
                query.new_empty(2, 1, *query.shape[1:3], 32),
            )
            work = Work(query, tiles, 0.3, total)
            kernels.pick(work).attend(work)
            total.write(out)
            results.append(out)
        tolerance = 1e-5 if dtype == torch.float32 else 1e-2
        torch.testing.assert_close(*results, rtol=tolerance, atol=tolerance)


def test_the_last_place_of_a_tile_within_memory_is_written():
    memory = [draw(1, 3, 50, 16, dtype=torch.float32, seed=seed).to(DEVICE) for seed in (3, 4)]
    query, new = draw(1, 2, 2, 1, 16, dtype=torch.float32), draw(1, 2, 1, 16, dtype=torch.float32)
    query, new, results = query.to(DEVICE), new.to(DEVICE), []
    for kernels in (triton(), reference()):
        held, out = KV(*(part.clone() for part in memory)), query.new_empty(1, 1, 2, 2, 16)
        tile = tile_in_hand(held)._replace(first=7, tokens=20, heads=slice(1, 3))
        kernels.decode(TokenWork(query, KV(new, new), tile, 0.5, out))
        results.append((out, held))
    torch.testing.assert_close(results[0][0], results[1][0])
    assert torch.equal(results[0][1].keys, results[1][1].keys)
    assert torch.equal(results[0][1].values, results[1][1].values)
    assert torch.equal(results[0][1].keys[:, 1:, 26:27], new)


def test_totals_are_those_of_the_rows():
    few, many = (draw(1, 1, 2, q_len, 16, dtype=torch.float32) for q_len in (32, 33))
    assert isinstance(triton().begin(few.to(DEVICE), scale=1.0), Slots)
    assert not isinstance(triton().begin(many.to(DEVICE), scale=1.0), Slots)


@pytest.mark.covering(most=1)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_place_read_from_memory_gives_the_same_bits_as_one_of_the_launch(dtype):
    """For any number of tokens, wherever the first of them lies: a captured launch serves all."""
    batch, kv_heads, group, dim, capacity = 2, 2, 3, 48, 1600
    one = triton()
    held = KV(*(draw(batch, kv_heads, capacity, dim, dtype=dtype, seed=n) for n in (3, 4)))
    held = KV(held.keys.to(DEVICE), held.values.to(DEVICE))
    query, new = draw(batch, kv_heads, group, 1, dim, dtype=dtype), draw(2, 2, 1, dim, dtype=dtype)
    query, new = query.to(DEVICE), new.to(DEVICE)
    place = torch.zeros(3, dtype=torch.int64, device=DEVICE)
    counters = torch.zeros(batch * kv_heads, dtype=torch.int32, device=DEVICE)
    for first, tokens in [(0, 1), (0, 257), (31, 64), (7, 1024), (0, capacity)]:
        place.copy_(torch.tensor([first, tokens, 0]))
        results = []
        for read in (False, True):
            kept, out = KV(*(part.clone() for part in held)), query.new_empty(2, 1, 2, 3, dim)
            tile = tile_in_hand(kept)
            if not read:
                tile = tile._replace(first=first, tokens=tokens)
            work = TokenWork(query, KV(new, new), tile, 0.3, out)
            if read:
                work.place, work.counters = place, counters
            one.decode(work)
            results.append((out, kept))
        assert torch.equal(results[0][0], results[1][0])
        assert torch.equal(results[0][1].keys, results[1][1].keys)
        assert torch.equal(results[0][1].values, results[1][1].values)
        assert torch.equal(results[1][1].keys[:, :, first + tokens - 1], new[:, :, 0])


@pytest.mark.covering(most=6)
@pytest.mark.parametrize("counted", [0, 1, 63, 64, 255, 256, 300, 511, 700, 1000])
@pytest.mark.parametrize("rows", [1, 12])
def test_a_tile_whose_tokens_are_counted_in_memory_gives_the_bits_of_one_as_long(counted, rows):
    """Also behind another tile, in heads of a wider memory, and with room for more tokens."""
    query = draw(2, 2, rows, 1, 32, dtype=torch.float32).to(DEVICE)
    keys, values = (
        draw(2, 3, 1010, 32, dtype=torch.float32, seed=seed).to(DEVICE) for seed in (3, 4)
    )
    tile = tile_in_hand(KV(keys, values))._replace(first=10, tokens=1000, heads=slice(1, 3))
    before = tile._replace(first=0, tokens=300)
    found = []
    for by_memory in (False, True):
        kernels = triton()
        total = kernels.begin(query, scale=0.3)
        kernels.pick(Work(query, [before], 0.3)).attend(Work(query, [before], 0.3, total))
        if by_memory:
            number = torch.tensor([counted], device=DEVICE)
            kernels.attend_counted(Work(query, [tile._replace(counted=number)], 0.3, total))
        elif counted:
            shorter = tile._replace(tokens=counted)
            kernels.pick(Work(query, [shorter], 0.3)).attend(Work(query, [shorter], 0.3, total))
        out = query.new_full((2, 1, 2, rows, 32), 7.0)
        total.write(out)
        found.append(out)
    assert torch.equal(*found)


def test_more_slots_than_are_merged_at_once_are_refused():
    query = draw(1, 1, 8, 8, 128, dtype=torch.float32).to(DEVICE)
    memory = draw(1, 1, 300, 128, dtype=torch.float32).to(DEVICE)
    tile = tile_in_hand(KV(memory, memory))
    kernels = triton()
    total = kernels.begin(query, scale=0.3)
    assert isinstance(total, Slots)
    total.used = total.capacity
    number = torch.tensor([300], device=DEVICE)
    with pytest.raises(PlaceError, match="more partials"):
        kernels.attend_counted(Work(query, [tile._replace(counted=number)], 0.3, total))
