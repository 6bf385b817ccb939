"""The Triton merge against the plain one: on a GPU, or in Triton's interpreter without one."""

import importlib.util

import pytest
import torch
from test_kernels import draw

from attended import reference
from headinfer.attend.partial import Accumulator, Partial
from headinfer.attend.reference import ReferenceKernel
from headinfer.attend.work import Work, tile_in_hand
from headinfer.kv.pair import KV

if importlib.util.find_spec("triton") is None:
    pytest.skip("no Triton", allow_module_level=True)
from headinfer.attend.fused_decode import MAX_ROWS, TritonKernels
from headinfer.attend.fused_merge import FusedAccumulator

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
pytestmark = [pytest.mark.gpu] if ON_GPU else []  # without one the interpreter serves
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


def draw_partial(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Partial:
    """Return a partial in one of the layouts of torch's kernels; some rows see nothing."""
    batch, kv_heads, group, q_len, dim = shape
    out = draw(batch, q_len, kv_heads, group, dim, dtype=dtype, seed=seed).to(DEVICE)
    out = out.permute(0, 2, 3, 1, 4)
    if seed % 2:
        out = out.contiguous()
    lse = draw(batch, kv_heads, group, q_len + 3, dtype=torch.float32, seed=seed + 50).to(DEVICE)
    lse = lse[..., :q_len] * 10
    lse[..., seed % 3 :: 3] = -torch.inf
    lse[..., -1] = -torch.inf  # the last row never sees anything
    out.masked_fill_(lse[..., None] == -torch.inf, 0)
    return Partial(out, lse)


@pytest.mark.covering(most=3)
@pytest.mark.parametrize("sinks", [False, True], ids=["", "sinks"])
@pytest.mark.parametrize("partials", [1, 2, 4, 5, 9])  # 4 are merged at once
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_partials_and_sinks_merge_as_by_tensor_operations(dtype, partials, sinks):
    for shape in [(2, 2, 3, 37, 80), (1, 1, 1, 1, 128), (1, 3, 4, 17, 16)]:
        batch, kv_heads, group, q_len, dim = shape
        scores = draw(kv_heads, group, dtype=dtype).to(DEVICE)
        results = []
        for total in (FusedAccumulator(), Accumulator()):
            out = torch.full((batch, q_len, kv_heads + 1, group, dim), 7.0, device=DEVICE)
            out = out.to(dtype)
            for seed in range(partials):
                total.add(draw_partial(shape, dtype, seed))
            if sinks:
                total.add_sinks(scores)
            total.write(out[:, :, :kv_heads])
            assert (out[:, :, kv_heads:] == 7).all()
            results.append(out)
        assert not results[0][:, -1, :kv_heads].any()
        torch.testing.assert_close(*results, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def test_partials_given_are_left_as_they_are():
    given = [draw_partial((1, 2, 2, 9, 32), torch.float32, seed) for seed in range(6)]
    kept = [Partial(part.out.clone(), part.lse.clone()) for part in given]
    total = FusedAccumulator()
    for part in given:
        total.add(part)
    total.write(torch.empty(1, 9, 2, 2, 32, device=DEVICE))
    for part, before in zip(given, kept, strict=True):
        assert torch.equal(part.out, before.out)
        assert torch.equal(part.lse, before.lse)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_tiles_of_a_chunk_are_attended_by_the_other_kernel_and_merged(dtype):
    batch, kv_heads, group, q_len, dim = 2, 2, 3, 31, 32
    assert group * q_len > MAX_ROWS
    query = draw(batch, q_len, kv_heads, group, dim, dtype=dtype).to(DEVICE)
    query = query.permute(0, 2, 3, 1, 4)  # as models hand it over
    results = []
    for kernels in (TritonKernels([ReferenceKernel()], [], multiprocessors=6), reference()):
        total = kernels.begin(query, scale=0.3)
        out = query.new_empty(batch, q_len, kv_heads, group, dim)
        keys = draw(batch, kv_heads, 90, dim, dtype=dtype, seed=3).to(DEVICE)
        whole = tile_in_hand(KV(keys, keys))
        for first, tokens in ((0, 31), (31, 19), (50, 40)):
            tile = whole._replace(first=first, tokens=tokens)
            work = Work(query, [tile], 0.3, total, causal=not first)
            kernels.pick(work).attend(work)
        total.write(out)
        results.append(out)
    torch.testing.assert_close(*results, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
