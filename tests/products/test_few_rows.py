"""Products of few rows: float32 sums rounded once, whatever the shape, and weights read anew."""

import platform
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from headinfer.native import build
from headinfer.products.few_rows import MAX_ROWS, few_rows_library, multiply

DTYPES = [torch.bfloat16, torch.float16]

needs_compiler = pytest.mark.skipif(
    shutil.which("cc") is None or build._openmp_library() is None, reason="no compiled kernels"
)


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """An empty cache folder, and a process that has compiled and said nothing yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(build, "_missing", [])
    few_rows_library.cache_clear()
    yield
    few_rows_library.cache_clear()


@pytest.fixture
def two_threads() -> Iterator[None]:
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


def draw(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def check(
    rows: tuple[int, ...], size: int, out: int, dtype: torch.dtype, *, biased: bool = False
) -> None:
    """Compare with float64: less than one rounding away, and the little of float32's sums."""
    x, weight = draw(*rows, size, dtype=dtype), draw(out, size, dtype=dtype, seed=1)
    bias = draw(out, dtype=dtype, seed=2) if biased else None
    ours = multiply(x, weight, bias)
    assert ours is not None
    assert (ours.dtype, ours.shape) == (dtype, (*rows, out))
    exact = torch.nn.functional.linear(
        x.double(), weight.double(), None if bias is None else bias.double()
    )
    sizes = x.double().abs() @ weight.double().abs().T
    rounding = torch.finfo(dtype).eps / 2 * exact.abs()
    assert ((ours.double() - exact).abs() <= rounding * 1.001 + sizes * 2e-6).all()


@pytest.mark.covering
@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", range(1, MAX_ROWS + 1))
def test_any_number_of_few_rows_is_rounded_once(dtype: torch.dtype, rows: int) -> None:
    check((rows,), 96, 48, dtype)
    check((1, rows), 77, 53, dtype, biased=True)


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(
    ("size", "out"),
    [(1, 1), (3, 2), (15, 17), (16, 16), (31, 33), (64, 1), (129, 300), (1000, 7), (2053, 35)],
)
def test_shapes_that_no_vector_divides(
    dtype: torch.dtype, biased: bool, size: int, out: int
) -> None:
    for rows in ((1, 1), (2, 1), (3,), (2, 4)):
        check(rows, size, out, dtype, biased=biased)


@pytest.mark.covering
@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("size", "out"), [(576, 1536), (511, 3001), (20000, 61)])
def test_threads_share_the_outputs(
    two_threads: None, dtype: torch.dtype, size: int, out: int
) -> None:
    check((1,), size, out, dtype, biased=True)
    check((5,), size, out, dtype)


@pytest.mark.covering
@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("flags", ["-mno-avx512f", "-mno-avx512f -mno-avx2 -mno-fma -mno-f16c"])
def test_lesser_processors(
    fresh: None, monkeypatch: pytest.MonkeyPatch, flags: str, dtype: torch.dtype
) -> None:
    if platform.machine() != "x86_64":
        pytest.skip("these flags are those of x86")
    monkeypatch.setenv("CC", f"cc {flags}")
    check((1,), 77, 53, dtype, biased=True)
    check((7,), 130, 40, dtype)


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_no_number_or_small_stays_so(dtype: torch.dtype) -> None:
    weight = torch.zeros(40, 70, dtype=dtype)
    weight[3, 69], weight[4, 1], weight[39, 20] = torch.inf, -torch.inf, torch.nan
    weight[5, 68] = torch.finfo(dtype).smallest_normal
    weight.view(torch.int16)[38, 20] = 0x7FFF  # NaN too, with all bits set
    (ours,) = multiply(torch.ones(1, 70, dtype=dtype), weight, None)
    assert torch.equal(ours[:38], weight.sum(1)[:38])
    assert ours[38:].isnan().all()
    small = torch.full((1, 70), 2.0**-20).half()  # float16's own subnormals
    assert multiply(small, torch.eye(70).half(), None).equal(small)


@needs_compiler
def test_weights_are_read_anew_each_time() -> None:
    x, weight = draw(1, 64, dtype=torch.bfloat16), draw(32, 64, dtype=torch.bfloat16, seed=1)
    before = multiply(x, weight, None)
    weight.data.mul_(2)  # as an adapter is merged
    assert torch.equal(multiply(x, weight, None), 2 * before)


@needs_compiler
def test_rows_with_gaps_are_served() -> None:
    x, weight = draw(2, 3, 64, dtype=torch.float16), draw(9, 64, dtype=torch.float16, seed=1)
    ours = multiply(x[:, -1:], weight, None)
    assert torch.equal(ours, multiply(x[:, -1:].contiguous(), weight, None))


class Wrapped(torch.Tensor):
    """Stands for weights that somebody keeps in another form."""


X, WEIGHT = torch.ones(1, 8).half(), torch.ones(4, 8).half()


@pytest.mark.parametrize(
    ("x", "weight", "bias"),
    [
        pytest.param(X.float(), WEIGHT.float(), None, id="float32"),
        pytest.param(X.bfloat16(), WEIGHT, None, id="two dtypes"),
        pytest.param(X, WEIGHT, torch.ones(4), id="a bias of another dtype"),
        pytest.param(torch.ones(MAX_ROWS + 1, 8).half(), WEIGHT, None, id="many rows"),
        pytest.param(torch.ones(0, 8).half(), WEIGHT, None, id="no row"),
        pytest.param(X[:, :4], WEIGHT, None, id="other sizes"),
        pytest.param(X, torch.ones(8, 4).half().T, None, id="columns in a row"),
        pytest.param(X, WEIGHT.as_subclass(Wrapped), None, id="a subclass"),
        pytest.param(X.as_subclass(Wrapped), WEIGHT, None, id="rows of a subclass"),
        pytest.param(X.to("meta"), WEIGHT.to("meta"), None, id="no memory"),
        pytest.param(X, WEIGHT.flatten(), None, id="flattened"),
    ],
)
def test_what_is_not_served(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> None:
    assert multiply(x, weight, bias) is None


def test_without_a_compiler_nothing_is_served(
    fresh: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CC", "no-such-compiler")
    assert multiply(X, WEIGHT, None) is None
    assert multiply(X.bfloat16(), WEIGHT.bfloat16(), None) is None
    assert caplog.text.count("compiled kernels for the CPU cannot be had") <= 2
    assert sum(record.levelname == "WARNING" for record in caplog.records) == 1
