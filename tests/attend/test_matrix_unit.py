"""Kernels for AVX-512 and a matrix unit, where there is none: compiled for it, and done in C."""

import platform
import shutil
import subprocess
from collections.abc import Iterator
from importlib import resources
from pathlib import Path

import pytest
import torch

import eight_bit_values
import packed_values
from attended import attended, native, reference
from headinfer.attend.native.kernel import NativeKernel, decode_library
from headinfer.attend.partial import Accumulator
from headinfer.attend.work import Work
from headinfer.eight_bits import reference as eight_bits
from headinfer.kv.extent import Piece, Tile
from headinfer.kv.pair import KV
from headinfer.native.build import ELEMENTS
from headinfer.packed.reference import pack
from headinfer.plan.format import Format

SPANS = [(0, 192), (64, 150), (5, 290)]
TOKENS = 300
UNIT = Path(__file__).parent / "matrix_unit.h"
VECTORS = Path(__file__).parent / "wide_vectors.h"
COMPILER = shutil.which("gcc")

pytestmark = pytest.mark.skipif(
    COMPILER is None or platform.machine() != "x86_64", reason="no GCC for x86"
)


def _compiled_with(
    headers: list[Path], monkeypatch: pytest.MonkeyPatch, folder: Path
) -> Iterator[None]:
    """Have kernels compiled anew, with what the processor lacks in plain C."""
    if "avx512_bf16" not in Path("/proc/cpuinfo").read_text():
        headers = [VECTORS, *headers]
    monkeypatch.setenv("CC", " ".join([str(COMPILER), *(f"-include {each}" for each in headers)]))
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    decode_library.cache_clear()
    yield
    decode_library.cache_clear()


@pytest.fixture
def unit_in_c(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """A matrix unit in plain C, and vectors of 512 bits where there are none."""
    yield from _compiled_with([UNIT], monkeypatch, tmp_path)


@pytest.fixture
def vectors_in_c(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Vectors of 512 bits without a matrix unit, in plain C where there are none."""
    yield from _compiled_with([], monkeypatch, tmp_path)


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


def stored(
    form: Format, dim: int, seed: int, kind: str, tokens: int = TOKENS
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return keys or values, the pages that stand for them, and memory that must outlive these.

    Packed pages are of a `kind` of `packed_values`.
    """
    shape, code = (1, 2, tokens, dim), form.code
    if code is None:
        values = packed_values.drawn(kind, shape, seed)
        pages = pack(values)
        return values, pages, packed_values.keep_raw(pages, values)
    values = eight_bit_values.drawn("outliers", shape, seed)
    pages = eight_bits.pack(code, values)
    kept = eight_bit_values.keep_raw(code, pages, values)
    return eight_bit_values.unpacked(code, pages, values), pages, kept


def check_forms(
    rows: int,
    *forms: Format,
    dim: int = 64,
    kind: str = "full",
    spans: list[tuple[int, int]] = SPANS,
) -> None:
    """Compare pages with what they stand for, to the last bit; spans begin within pages, too."""
    generator = torch.Generator().manual_seed(rows)
    query = torch.randn(1, 2, rows, 1, dim, generator=generator).bfloat16()
    most = max(TOKENS, *(first + tokens for first, tokens in spans))
    for form in forms:
        keys, values = (stored(form, dim, seed, kind, most) for seed in (0, 1))
        results = []
        for whole, lie_as in (
            (KV(keys[0], values[0]), Format.DENSE),
            (KV(keys[1], values[1]), form),
        ):
            total, piece = Accumulator(), Piece(whole.keys)
            tiles = [Tile(0, tokens, piece, whole, first, format=lie_as) for first, tokens in spans]
            work = Work(query, tiles, 0.02, total)
            assert NativeKernel().serves(work)
            NativeKernel().attend(work)
            results.append(total.result())
        assert results[0].lse.isfinite().all()
        assert torch.equal(results[0].out, results[1].out), form
        assert torch.equal(results[0].lse, results[1].lse), form


@pytest.mark.covering("rows", "kind", most=2)
@pytest.mark.parametrize(
    ("rows", "forms", "dim", "kind"),
    [
        (4, [Format.PACKED, Format.INT8], 64, "full"),
        (17, [Format.PACKED, Format.INT8], 64, "full"),
        (17, [Format.PACKED], 128, "full"),
        (17, [Format.PACKED], 128, "one too many"),
        (35, [Format.PACKED], 96, "full"),
        (49, [Format.PACKED, Format.FP8], 192, "full"),
    ],
)
def test_pages_on_a_matrix_unit_in_c(
    unit_in_c: None, rows: int, forms: list[Format], dim: int, kind: str
) -> None:
    check_forms(rows, *forms, dim=dim, kind=kind)


@pytest.mark.slow
def test_pages_on_a_matrix_unit_in_c_in_several_stretches(unit_in_c: None) -> None:
    torch.set_num_threads(2)
    try:
        check_forms(17, Format.PACKED, spans=[(37, 1601)])
    finally:
        torch.set_num_threads(1)


@pytest.mark.covering(most=1)
@pytest.mark.parametrize("few", [False, True], ids=["all of them", "few numbers"])
@pytest.mark.parametrize("form", [Format.DENSE, Format.PACKED])
def test_what_is_not_attended_on_a_matrix_unit_in_c_may_be_anything(
    unit_in_c: None, form: Format, *, few: bool
) -> None:
    """Pages of which few numbers are not finite do not overflow."""
    generator, some = torch.Generator().manual_seed(3), slice(None, None, 60 if few else None)
    query = torch.randn(1, 1, 18, 1, 64, generator=generator).bfloat16()
    for first, end in ((5, 290), (70, 130), (40, 41)):
        whole = KV(*torch.randn(2, 1, 1, 300, 64, generator=generator).bfloat16())
        for part in whole:
            part[:, :, :first, some] = torch.nan
            part[:, :, end:, some] = torch.inf
        pages = KV(*map(pack, whole))
        kept = [packed_values.keep_raw(page, part) for page, part in zip(pages, whole, strict=True)]
        lie_as = whole if form is Format.DENSE else pages
        total = Accumulator()
        tile = Tile(0, end - first, Piece(lie_as.keys), lie_as, first, format=form)
        NativeKernel().attend(Work(query, [tile], 0.2, total))
        seen = (part[:, :, first:end].double() for part in whole)
        want = attended(reference(), query.double(), *seen, scale=0.2)
        torch.testing.assert_close(total.result().out.double(), want.out, rtol=1e-2, atol=1e-2)
        torch.testing.assert_close(total.result().lse.double(), want.lse, rtol=1e-4, atol=1e-4)
        del kept  # outlived the pages


@pytest.mark.covering(most=1)
@pytest.mark.parametrize(
    ("rows", "forms"), [(1, [Format.PACKED, Format.FP8]), (4, [Format.PACKED, Format.INT8])]
)
def test_pages_in_vectors_in_c(vectors_in_c: None, rows: int, forms: list[Format]) -> None:
    check_forms(rows, *forms)


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
