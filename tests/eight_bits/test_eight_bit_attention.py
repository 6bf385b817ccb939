"""The CPU attends pages in 8 bits: the same bits as of what they stand for."""

import shutil
import sys

import pytest
import torch

from eight_bit_values import drawn, keep_raw, unpacked
from headinfer.attend.native.kernel import NativeKernel
from headinfer.attend.partial import Accumulator, Partial
from headinfer.attend.work import Work
from headinfer.eight_bits.layout import Code
from headinfer.eight_bits.reference import pack
from headinfer.kv.extent import Piece, Tile
from headinfer.kv.pair import KV
from headinfer.plan.format import Format

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or shutil.which("cc") is None, reason="no compiled kernels"
)

TILES = [(0, 1), (0, 64), (64, 1037), (5, 700), (63, 2), (130, 0)]


def same(got: Partial, want: Partial) -> None:
    assert torch.equal(got.out, want.out)
    assert torch.equal(got.lse, want.lse)
    assert want.lse.isfinite().all()


SHAPES = [
    (Code.INT8, torch.bfloat16, 64, 3),
    (Code.FP8, torch.float16, 48, 1),
    (Code.INT8, torch.float32, 128, 9),
    (Code.INT8, torch.float16, 48, 2),
    (Code.FP8, torch.bfloat16, 80, 16),
    (Code.FP8, torch.float32, 64, 1),
]


@pytest.mark.covering(most=1)
@pytest.mark.parametrize(
    ("code", "dtype", "dim", "group"),
    [pytest.param(*shape, marks=[pytest.mark.slow] * (at > 1)) for at, shape in enumerate(SHAPES)],
)
def test_tiles_and_jobs(code: Code, dtype: torch.dtype, dim: int, group: int) -> None:
    """Tiles begin and end within pages, too; pages that are not full are kept as they are."""
    generator = torch.Generator().manual_seed(dim)
    query = torch.randn(2, 2, group, 1, dim, generator=generator).to(dtype)
    dense, paged, kept = [], [], []
    for seed, (first, tokens) in enumerate(TILES):
        shape = (2, 2, first + tokens + 3, dim)
        kv = KV(*(drawn("outliers", shape, 2 * seed + at, dtype) for at in (0, 1)))
        pages = KV(*(pack(code, part) for part in kv))
        kept += [keep_raw(code, *both) for both in zip(pages, kv, strict=True)]
        near = KV(*(unpacked(code, *both) for both in zip(pages, kv, strict=True)))
        dense.append(Tile(0, tokens, Piece(near.keys), near, first))
        piece = Piece(pages.keys)
        paged.append(Tile(0, tokens, piece, pages, first, format=Format(code.value)))
    results = []
    for tiles in (dense, paged):
        total, work = Accumulator(), Work(query, tiles, 0.02)
        work.into = total
        assert NativeKernel().serves(work)
        NativeKernel().attend(work)
        answer = Partial(torch.zeros(query.shape), torch.zeros(query.shape[:-1]))
        jobs = NativeKernel().jobs(query, answer, scale=0.02)
        assert jobs is not None
        job = jobs.make(tiles)
        assert job is not None
        job()
        results.append((total.result(), answer))
    for of_dense, of_pages in zip(*results, strict=True):
        same(of_pages, of_dense)
