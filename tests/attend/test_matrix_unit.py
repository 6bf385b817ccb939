"""Kernels for a processor's matrix unit, where there is none: compiled for it, and done in C."""

import platform
import shutil
import subprocess
from collections.abc import Iterator
from importlib import resources
from pathlib import Path

import pytest
import torch

from attended import attended, native, reference
from headinfer.attend.native.kernel import NativeKernel, decode_library
from headinfer.attend.partial import Accumulator
from headinfer.attend.work import Work
from headinfer.kv.extent import Piece, Tile
from headinfer.kv.pair import KV
from headinfer.native.build import ELEMENTS
from headinfer.packed.reference import pack
from headinfer.plan.format import Format
from packed_values import drawn

SPANS = [(0, 192), (64, 150), (5, 290)]
UNIT = Path(__file__).parent / "matrix_unit.h"
COMPILER = shutil.which("gcc")

pytestmark = pytest.mark.skipif(
    COMPILER is None or platform.machine() != "x86_64", reason="no GCC for x86"
)


@pytest.fixture
def unit_in_c(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Kernels compiled anew, with a matrix unit in plain C."""
    if "avx512_bf16" not in Path("/proc/cpuinfo").read_text():
        pytest.skip("what is around the matrix unit needs AVX-512 with bfloat16")
    monkeypatch.setenv("CC", f"{COMPILER} -include {UNIT}")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    decode_library.cache_clear()
    yield
    decode_library.cache_clear()


@pytest.mark.parametrize(
    ("dtype", "dim", "shapes"),
    [
        (torch.bfloat16, 96, [(4, 16, 333), (5, 7, 128), (3, 11, 1), (17, 1, 517)]),
        (torch.bfloat16, 32, [(4, 1, 205)]),
    ],
)
def test_attention_on_a_matrix_unit_in_c(
    unit_in_c: None, dtype: torch.dtype, dim: int, shapes: list[tuple[int, int, int]]
) -> None:
    for group, q_len, tokens in shapes:
        library = decode_library(dtype, dim, group * q_len)
        assert not hasattr(library, "fewest_rows")  # it is one for the unit
        generator = torch.Generator().manual_seed(tokens)
        query, keys, values = (
            torch.randn(1, 2, *rest, dim, generator=generator).to(dtype)
            for rest in ((group, q_len), (tokens,), (tokens,))
        )
        ours = attended(native(), query, keys, values, scale=0.2)
        want = attended(reference(), query.double(), keys.double(), values.double(), scale=0.2)
        torch.testing.assert_close(ours.out.double(), want.out, rtol=1e-2, atol=1e-2)
        torch.testing.assert_close(ours.lse.double(), want.lse, rtol=1e-4, atol=1e-4)


def test_scores_that_grow_and_fall_on_a_matrix_unit_in_c(unit_in_c: None) -> None:
    """Highest scores rise by more and by less than is let pass, in blocks and between them."""
    heights = torch.tensor([0, 40, 3, 43, 90, -60, 0, 91, 180, 178]).repeat_interleave(32)[:301]
    generator = torch.Generator().manual_seed(7)
    query = torch.linspace(0.25, 1, 18)[:, None, None].expand(1, 1, 18, 1, 32).bfloat16()
    keys = (torch.rand(1, 1, 301, 32, generator=generator) + heights[:, None] / 32).bfloat16()
    values = torch.randn(1, 1, 301, 32, generator=generator).bfloat16()
    for tokens in (301, 288, 225, 160, 33):  # later tokens outweigh earlier ones
        given = query, keys[:, :, :tokens], values[:, :, :tokens]
        ours = attended(native(), *given, scale=0.7)
        want = attended(reference(), *(part.double() for part in given), scale=0.7)
        torch.testing.assert_close(ours.out.double(), want.out, rtol=1e-2, atol=1e-2)
        torch.testing.assert_close(ours.lse.double(), want.lse, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rows", [4, 17])
def test_packed_pages_on_a_matrix_unit_in_c(unit_in_c: None, rows: int) -> None:
    """The same bits as of the same tokens as they are; blocks begin within pages, too."""
    kv = KV(*(drawn("full", (1, 2, 300, 32), seed) for seed in (0, 1)))
    pages = KV(*map(pack, kv))
    query, results = torch.randn(1, 2, rows, 1, 32).bfloat16(), []
    for whole, form in ((kv, Format.DENSE), (pages, Format.PACKED)):
        total = Accumulator()
        piece = Piece(whole.keys)
        tiles = [Tile(0, tokens, piece, whole, first, format=form) for first, tokens in SPANS]
        NativeKernel().attend(Work(query, tiles, 0.2, total))
        results.append(total.result())
    assert torch.equal(results[0].out, results[1].out)
    assert torch.equal(results[0].lse, results[1].lse)


@pytest.mark.parametrize(("source", "rows"), [("decode_tiles.c", 16), ("decode_groups.c", 256)])
def test_kernels_compile_for_a_matrix_unit(tmp_path: Path, source: str, rows: int) -> None:
    flags = ["-O1", "-fopenmp", "-march=icelake-server", "-mavx512bf16", "-mamx-bf16", "-mamx-tile"]
    folders = resources.files("headinfer.attend.native"), resources.files("headinfer.native")
    defined = [f"-D{ELEMENTS[torch.bfloat16]}", "-DHEAD_DIM=64", f"-DROWS={rows}"]
    target = tmp_path / "kernel.s"
    command = [
        *(COMPILER, *flags, *defined, *(f"-I{folder}" for folder in folders)),
        *("-S", "-o", str(target), str(folders[0] / source)),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    if "unrecognized" in done.stderr:
        pytest.skip("this GCC knows no matrix unit")
    assert done.returncode == 0, done.stderr
    assert "tdpbf16ps" in target.read_text()
