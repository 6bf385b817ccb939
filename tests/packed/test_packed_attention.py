"""The CPU attends packed pages: the same bits as of the same tokens as they are."""

import shutil
import sys
from collections.abc import Iterator

import pytest
import torch

from headinfer.attend.native.kernel import NativeKernel, decode_library
from headinfer.attend.partial import Accumulator, Partial
from headinfer.attend.work import Work
from headinfer.kv.extent import Piece, Tile
from headinfer.kv.pair import KV
from headinfer.packed.reference import pack
from headinfer.plan.format import Format
from packed_values import drawn, keep_raw

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or shutil.which("cc") is None, reason="no compiled kernels"
)

SCALE = 0.2
TILES = [(0, 1), (0, 64), (64, 1037), (5, 700), (63, 2), (130, 0)]


@pytest.fixture(params=[1, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


class Case:
    """The same tokens of some tiles, as they are and packed, and queries.

    Tiles begin and end within pages, too; some have pages that overflow.
    """

    def __init__(
        self, query_shape: tuple[int, ...], tiles: list[tuple[int, int]], kind: str = "normal"
    ) -> None:
        batch, kv_heads, _, _, dim = query_shape
        generator = torch.Generator().manual_seed(sum(query_shape))
        self.query = torch.randn(query_shape, generator=generator).bfloat16()
        self.dense: list[Tile] = []
        self.packed: list[Tile] = []
        self.kept: list[torch.Tensor] = []
        for seed, (first, tokens) in enumerate(tiles):
            shape = (batch, kv_heads, first + tokens + 3, dim)
            kv = KV(*(drawn(kind, shape, 2 * seed + part) for part in (0, 1)))
            pages = KV(*map(pack, kv))
            self.kept += [keep_raw(*both) for both in zip(pages, kv, strict=True)]
            self.dense.append(Tile(0, tokens, Piece(kv.keys), kv, first))
            piece = Piece(pages.keys)
            self.packed.append(Tile(0, tokens, piece, pages, first, format=Format.PACKED))

    def attended(self, tiles: list[Tile], mask: torch.Tensor | None = None) -> Partial:
        total = Accumulator()
        work = Work(self.query, tiles, SCALE, total, mask=mask)
        assert NativeKernel().serves(work)
        NativeKernel().attend(work)
        return total.result()

    def job(self, tiles: list[Tile]) -> Partial:
        shape = self.query.shape
        answer = Partial(torch.full(shape, torch.nan), torch.full(shape[:-1], torch.nan))
        jobs = NativeKernel().jobs(self.query, answer, scale=SCALE)
        assert jobs is not None
        job = jobs.make(tiles)
        assert job is not None
        job()
        return answer


def same(got: Partial, want: Partial) -> None:
    assert torch.equal(got.out, want.out)
    assert torch.equal(got.lse, want.lse)
    assert want.lse.isfinite().all()


@pytest.mark.covering
@pytest.mark.parametrize(("dim", "group", "q_len"), [(64, 3, 1), (48, 1, 1), (64, 5, 4)])
def test_tiles_and_jobs(threads: int, dim: int, group: int, q_len: int) -> None:
    case = Case((2, 2, group, q_len, dim), TILES)
    same(case.attended(case.packed), case.attended(case.dense))
    same(case.job(case.packed), case.job(case.dense))


@pytest.mark.parametrize("kind", ["full", "one too many"])
def test_escapes_and_pages_that_overflow(kind: str) -> None:
    case = Case((1, 2, 3, 1, 64), [(0, 300)], kind)
    same(case.attended(case.packed), case.attended(case.dense))


def test_forms_are_mixed() -> None:
    case = Case((1, 2, 3, 1, 64), TILES)
    mixed = [*case.packed[:3], *case.dense[3:]]
    same(case.attended(mixed), case.attended(case.dense))
    same(case.job(mixed), case.job(case.dense))


def test_some_heads_of_pages() -> None:
    case = Case((1, 3, 3, 1, 64), [(5, 700)])
    case.query = case.query[:, 1:]
    some = slice(1, 3)
    dense, packed = (
        [tile._replace(heads=some) for tile in tiles] for tiles in (case.dense, case.packed)
    )
    same(case.attended(packed), case.attended(dense))


def test_padding() -> None:
    """Rows of the batch see other stretches of tokens."""
    case = Case((2, 2, 3, 1, 64), [(7, 200)])
    mask = torch.ones(2, 1, 200, dtype=torch.bool)
    mask[0, 0, :71] = False
    same(case.attended(case.packed, mask), case.attended(case.dense, mask))


@pytest.mark.slow
@pytest.mark.parametrize("dim", [16, 80, 96, 128, 256])
@pytest.mark.parametrize(("group", "q_len"), [(1, 1), (2, 1), (4, 1), (8, 1), (9, 1), (4, 5)])
def test_all_shapes(dim: int, group: int, q_len: int) -> None:
    case = Case((1, 2, group, q_len, dim), TILES)
    same(case.attended(case.packed), case.attended(case.dense))


def test_what_is_not_served() -> None:
    """Pages of another size are not taken for such tokens, and other dtypes have no pages."""
    case = Case((1, 2, 1, 1, 64), [(0, 100)])
    assert not NativeKernel().serves(Work(case.query[..., :48], case.packed, SCALE))
    assert decode_library(torch.float16, 64, 3, Format.PACKED) is None
    assert decode_library(torch.bfloat16, 2048, 3, Format.PACKED) is None
