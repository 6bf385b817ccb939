"""Bounded scores (Gemma 2) by the Triton programs: on a GPU, or in the interpreter without one."""

import importlib.util
from types import SimpleNamespace

import pytest
import torch
from test_kernels import SHAPES, check, draw

from attended import exact_band, only
from headinfer.attend.check import agrees
from headinfer.attend.cuda import candidates
from headinfer.attend.reference import ReferenceKernel
from headinfer.attend.select import select_kernels
from headinfer.attend.table import Kernels
from headinfer.attend.work import TokenWork, Work, tile_in_hand
from headinfer.kv.pair import KV

if importlib.util.find_spec("triton") is None:
    pytest.skip("no Triton", allow_module_level=True)
from headinfer.attend.fused_chunk import LEAST_SPLIT_TOKENS, TritonChunks, blocks_of
from headinfer.attend.fused_decode import MAX_ROWS, TritonKernels, serves

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
pytestmark = [pytest.mark.gpu] if ON_GPU else []  # without one the interpreter serves
DTYPES = [torch.float32, torch.float16]
CHUNK_DTYPES = [torch.float16]
if ON_GPU:  # the interpreter multiplies the bits of bfloat16 as if they were integers
    DTYPES.append(torch.bfloat16)
    CHUNK_DTYPES.append(torch.bfloat16)
else:  # larger blocks than a GPU has memory for in float32
    CHUNK_DTYPES.append(torch.float32)
CAP = 3.0
H100_BYTES, RTX_4090_BYTES = 227 * 2**10, 99 * 2**10


def chunks(dim: int, *, multiprocessors: int = 6, shared_bytes: int = 0) -> TritonChunks:
    if ON_GPU:
        return TritonChunks.on(torch.device("cuda"), dim, CAP)
    return TritonChunks(dim, multiprocessors, shared_bytes, CAP)


def table(dim: int, *, softcap: float | None = CAP) -> Kernels:
    return TritonKernels([chunks(dim)], [], multiprocessors=6, softcap=softcap)


def capped_reference() -> Kernels:
    return Kernels([ReferenceKernel(CAP)])


@pytest.mark.covering(most=1)
@pytest.mark.parametrize("kind", ["tile", "padding"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_few_rows_by_definition(dtype, kind):
    for shape in SHAPES if ON_GPU or kind == "tile" else SHAPES[::2]:
        if serves(dtype, shape[-1]) and shape[2] * shape[3] <= MAX_ROWS:
            kernels = TritonKernels([], [], multiprocessors=6, softcap=CAP)
            check(kernels, shape, dtype, kind, DEVICE, CAP)


CHUNKS = [  # batch, kv_heads, group, q_len, kv_len, head_dim
    (1, 1, 2, 5, 40, 256),
    (1, 2, 1, 6, 1, 32),
    (1, 1, 1, 9, 3, 32),
    (2, 2, 3, 33, 65, 24),
    (2, 1, 1, 2, 177, 96),
    (1, 1, 2, 35, 135, 256),
    (1, 1, 1, 130, 140, 64),
]
if ON_GPU:  # which multiplies no rows shorter than 16
    CHUNKS += [
        *(shape for shape in SHAPES if serves(torch.float16, shape[-1])),
        (2, 8, 2, 1000, 1003, 256),
        (1, 1, 2, 4096, 5000, 256),
    ]


@pytest.mark.covering(most=2)
@pytest.mark.parametrize("shared_bytes", [0, H100_BYTES])
@pytest.mark.parametrize("kind", ["tile", "causal", "padding", "mask"])
@pytest.mark.parametrize("dtype", CHUNK_DTYPES)
def test_many_rows_by_definition(dtype, kind, shared_bytes):
    for shape in CHUNKS:
        check(only(chunks(shape[-1], shared_bytes=shared_bytes)), shape, dtype, kind, DEVICE, CAP)


@pytest.mark.covering(most=2)
@pytest.mark.parametrize(
    ("batch", "q_len", "kv_len", "window"),
    [(1, 5, 5, 2), (2, 130, 300, 77), (1, 40, 295, 256), (1, 33, 64, 100), (1, 2, 70, 24)],
)
@pytest.mark.parametrize("dtype", CHUNK_DTYPES)
def test_a_window_without_masks_sees_what_masks_show(dtype, batch, q_len, kv_len, window):
    query = draw(batch, q_len, 2, 3, 32, dtype=dtype).to(DEVICE).permute(0, 2, 3, 1, 4)
    wide = draw(2, batch, 4, kv_len, 32, dtype=dtype).to(DEVICE)
    kv = KV(*wide[:, :, 1:3])  # heads at the distances of a cache
    ours = chunks(32).band(query, kv, 0.5, window)
    wanted = exact_band(query, kv, 0.5, window, CAP)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(ours.out.double(), wanted.out, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(ours.lse.double(), wanted.lse, rtol=1e-3, atol=1e-3)


@pytest.mark.covering(most=1)
@pytest.mark.parametrize("tokens", [1, 64, 700])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_new_token_is_attended_and_kept(dtype, tokens):
    """Alike where its place is given and where it is read from memory, as a capture reads it."""
    query, new = draw(2, 2, 3, 1, 256, dtype=dtype), draw(2, 2, 1, 256, dtype=dtype, seed=1)
    query, new = query.to(DEVICE), new.to(DEVICE)
    memory = [draw(2, 2, tokens + 9, 256, dtype=dtype, seed=seed).to(DEVICE) for seed in (3, 4)]
    place = torch.tensor([4, tokens, 0], device=DEVICE)
    counters = torch.zeros(4, dtype=torch.int32, device=DEVICE)
    results = []
    for kernels, read in ((table(256), False), (table(256), True), (capped_reference(), False)):
        held = KV(*(part.clone() for part in memory))
        out, tile = query.new_empty(2, 1, 2, 3, 256), tile_in_hand(held)
        if not read:
            tile = tile._replace(first=4, tokens=tokens)
        work = TokenWork(query, KV(new, new), tile, 0.2, out)
        if read:
            work.place, work.counters = place, counters
        kernels.decode(work)
        assert torch.equal(held.keys[:, :, tokens + 3], new[:, :, 0])
        results.append(out)
    assert torch.equal(results[0], results[1])
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(results[0], results[2], rtol=tolerance, atol=tolerance)


def test_a_tile_whose_tokens_are_counted_in_memory_is_bounded_alike():
    query = draw(1, 2, 4, 1, 32, dtype=torch.float32).to(DEVICE)
    parts = [draw(1, 2, 1000, 32, dtype=torch.float32, seed=seed).to(DEVICE) for seed in (3, 4)]
    tile, results = tile_in_hand(KV(*parts)), []
    for kernels in (table(32), capped_reference()):
        total, out = kernels.begin(query, scale=0.5), query.new_empty(1, 1, 2, 4, 32)
        if kernels.kernels[0].name == "Triton decode":
            number = torch.tensor([700], device=DEVICE)
            kernels.attend_counted(Work(query, [tile._replace(counted=number)], 0.5, total))
        else:
            kernels.kernels[0].attend(Work(query, [tile._replace(tokens=700)], 0.5, total))
        total.write(out)
        results.append(out)
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)


@pytest.mark.covering(most=1)
@pytest.mark.parametrize("tokens", [LEAST_SPLIT_TOKENS - 1, 2 * LEAST_SPLIT_TOKENS + 33])
def test_tokens_are_divided_where_queries_do_not_fill_the_device(tokens):
    """Into parts that merge to the whole, in any kind of total."""
    dtype = torch.float16
    query = draw(1, 1, 2, 40, 32, dtype=dtype).to(DEVICE)
    kv = KV(*(draw(1, 1, tokens, 32, dtype=dtype, seed=seed).to(DEVICE) for seed in (3, 4)))
    many, results = chunks(32, multiprocessors=60), []
    for kernels in (TritonKernels([many], [], 6, softcap=CAP), capped_reference()):
        total, out = kernels.begin(query, scale=0.5), query.new_empty(1, 40, 1, 2, 32)
        work = Work(query, [tile_in_hand(kv)], 0.5, total)
        kernels.pick(work).attend(work)
        total.write(out)
        results.append(out)
    torch.testing.assert_close(*results, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dim", [16, 64, 80, 128, 256])
def test_programs_fit_the_memory_of_a_card(dim, masked):
    sizes = [
        blocks_of(dim, shared_bytes, masked=masked)
        for shared_bytes in (H100_BYTES, 163 * 2**10, RTX_4090_BYTES, 48 * 2**10)
    ]
    for blocks, shared_bytes in zip(sizes, (227, 163, 99, 64), strict=True):
        assert blocks.shared_bytes(256, masked=masked) <= shared_bytes * 2**10 or dim < 256
    rows = [blocks.rows for blocks in sizes]
    assert rows == sorted(rows, reverse=True)


def test_the_check_feels_a_bound():
    """A table that ignores it, though caps are far above most scores, does not agree."""
    device, softcap = torch.device("cpu"), 50.0
    assert agrees(only(ReferenceKernel(softcap)), device, torch.bfloat16, 64, softcap)
    assert not agrees(only(ReferenceKernel()), device, torch.bfloat16, 64, softcap)


@pytest.mark.slow
def test_the_programs_pass_the_check_with_their_bound_and_with_no_other():
    dtype, device = torch.float32, torch.device(DEVICE)
    rest = [ReferenceKernel(CAP)]
    good = TritonKernels([], rest, multiprocessors=6, softcap=CAP)
    assert agrees(good, device, dtype, 32, CAP)
    for wrong in (None, 2 * CAP):
        kernels = TritonKernels([], rest, multiprocessors=6, softcap=wrong)
        assert not agrees(kernels, device, dtype, 32, CAP)


@pytest.mark.parametrize(
    ("dtype", "dim", "names"),
    [
        (torch.bfloat16, 256, ["Triton decode and Triton chunks", "Triton decode"]),
        (torch.float16, 64, ["Triton decode and Triton chunks", "Triton decode"]),
        (torch.float32, 256, ["Triton decode"]),
        (torch.bfloat16, 12, []),
    ],
)
def test_tables_for_a_gpu_bound_scores_to_the_last_kernel(monkeypatch, dtype, dim, names):
    sizes = SimpleNamespace(multi_processor_count=132, shared_memory_per_block_optin=H100_BYTES)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _device: sizes)
    tables = candidates(torch.device("cuda"), dtype, dim, 50.0)
    assert [kernels.name for kernels in tables] == names
    assert {kernels.kernels[-1].name for kernels in tables} <= {"reference (softcap 50)"}


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("dtype", "name"),
    [
        (torch.bfloat16, "Triton decode and Triton chunks"),
        (torch.float16, "Triton decode and Triton chunks"),
        (torch.float32, "Triton decode"),
    ],
)
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_what_is_chosen_on_a_gpu(dim, dtype, name):
    kernels = select_kernels(torch.device("cuda"), dtype, dim, dim, 50.0)
    assert kernels.name == name
    assert (kernels.find_band() is not None) == (dtype != torch.float32)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_chunk_behind_many_tokens_takes_little_memory(dtype):
    """A head's tokens as a tile of the paper's method: their copies in float32 would be 128 MiB."""
    kernels = select_kernels(torch.device("cuda"), dtype, 256, 256, 50.0)
    query = torch.randn(1, 1, 2, 512, 256, dtype=dtype, device="cuda")
    parts = torch.randn(2, 1, 1, 2**17, 256, dtype=dtype, device="cuda")
    torch.cuda.reset_peak_memory_stats()
    before, total = torch.cuda.memory_allocated(), kernels.begin(query, scale=0.06)
    work = Work(query, [tile_in_hand(KV(*parts))], 0.06, total)
    kernels.pick(work).attend(work)
    taken = torch.cuda.max_memory_allocated() - before
    assert taken < (32 if dtype == torch.bfloat16 else 180) * 2**20
