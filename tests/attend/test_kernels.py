"""Every kernel against the definition of attention, on odd shapes and each dtype."""

import platform
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from attended import attended, native, only, reference
from headinfer.attend import cuda, select
from headinfer.attend.check import agrees
from headinfer.attend.cpu import CpuKernel
from headinfer.attend.cuda import CudaKernel, candidates
from headinfer.attend.fused_call import FusedCall, attend_split, operator
from headinfer.attend.masks import band_works
from headinfer.attend.native.kernel import NativeKernel, decode_library, prefill_library
from headinfer.attend.partial import Accumulator, Partial
from headinfer.attend.reference import ReferenceKernel
from headinfer.attend.select import select_kernels
from headinfer.attend.table import Kernels
from headinfer.attend.work import Work, tile_in_hand
from headinfer.kv.pair import KV

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 1e-2}


def draw(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def by_definition(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    scale: float,
    mask: torch.Tensor | None,
    softcap: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    query, keys, values = query.double(), keys.double(), values.double()
    scores = torch.einsum("bhgqd,bhkd->bhgqk", query, keys) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None, None], -torch.inf)
    lse = scores.logsumexp(dim=-1)
    weights = scores.softmax(dim=-1).nan_to_num(0.0)
    return torch.einsum("bhgqk,bhkd->bhgqd", weights, values), lse


SHAPES = [  # batch, kv_heads, group, q_len, kv_len, head_dim
    (1, 1, 1, 1, 1, 8),
    (1, 2, 4, 1, 1037, 64),
    (2, 3, 2, 1, 17, 16),
    (1, 1, 8, 3, 701, 80),
    (2, 2, 3, 33, 65, 24),
    (1, 4, 1, 130, 257, 128),
    (1, 1, 2, 5, 40, 256),
    (1, 2, 8, 1, 999, 128),
    (2, 1, 3, 2, 777, 96),
    (1, 1, 5, 1, 4099, 256),
    (1, 3, 7, 1, 63, 48),
    (1, 2, 1, 6, 1, 32),
    (1, 1, 1, 9, 3, 32),
    (2, 1, 4, 50, 1300, 64),
    (1, 3, 1, 97, 512, 96),
    (1, 2, 6, 2, 533, 96),
    (1, 1, 16, 1, 70, 32),
    (1, 2, 9, 1, 129, 128),
    (1, 2, 4, 16, 531, 128),
    (1, 2, 7, 70, 1300, 64),
    (2, 1, 9, 33, 65, 96),
]


def check(
    kernels: Kernels,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    kind: str,
    device: str = "cpu",
    softcap: float | None = None,
) -> None:
    """Compare with the definition; drawn and compared on the CPU, computed on `device`."""
    batch, kv_heads, group, q_len, kv_len, dim = shape
    if kind == "causal":
        kv_len = q_len
    query = draw(batch, kv_heads, group, q_len, dim, dtype=dtype)
    keys = draw(batch, kv_heads, kv_len, dim, dtype=dtype)
    values = draw(batch, kv_heads, kv_len, dim, dtype=dtype, seed=1)
    mask = None
    if kind == "causal":
        mask = torch.ones(1, q_len, kv_len, dtype=torch.bool).tril()
    elif kind == "padding":
        mask = torch.arange(kv_len)[None, None] >= torch.arange(batch)[:, None, None] * 7
    elif kind == "mask":
        mask = draw(1, q_len, kv_len) > 0.5
        mask[:, 0] = False  # a query that sees nothing
    ours = attended(
        kernels,
        query.to(device),
        keys.to(device),
        values.to(device),
        scale=0.2,
        causal=kind == "causal",
        mask=None if mask is None or kind == "causal" else mask.to(device),
    )
    assert {ours.out.device.type, ours.lse.device.type} == {device}
    our_out, our_lse = ours.out.cpu().double(), ours.lse.cpu().double()
    out, lse = by_definition(query, keys, values, 0.2, mask, softcap)
    blind = lse.isinf()
    assert torch.equal(our_lse.isinf(), blind)
    assert not our_out[blind].any()
    torch.testing.assert_close(our_out, out, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    torch.testing.assert_close(
        our_lse[~blind], lse[~blind], rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype]
    )


@pytest.mark.covering
@pytest.mark.parametrize("kind", ["tile", "causal", "padding", "mask"])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    "kernels", [native(), only(CpuKernel()), reference()], ids=lambda kernels: kernels.name
)
def test_kernel_on_the_cpu(kernels: Kernels, dtype: torch.dtype, kind: str) -> None:
    for shape in SHAPES:
        check(kernels, shape, dtype, kind)


@pytest.mark.covering
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("threads", [2, 3, 8])
def test_splitting_over_threads_changes_nothing(threads: int, shape: tuple[int, ...]) -> None:
    torch.set_num_threads(threads)
    try:
        check(only(CpuKernel()), shape, torch.float32, "tile")
        check(native(), shape, torch.float32, "tile")
    finally:
        torch.set_num_threads(1)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["tile", "causal", "padding", "mask"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("least_pairs", [1, 2**28])
def test_kernels_on_cuda(dtype, kind, least_pairs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "_CUDNN_PAIRS", least_pairs)
    for shape in SHAPES:
        for kernels in candidates(torch.device("cuda"), dtype, shape[-1]):
            check(kernels, shape, dtype, kind, "cuda")


@pytest.mark.parametrize("softcap", [1.5, 30.0])
def test_softcap_bounds_the_scores(softcap: float) -> None:
    kernels = select_kernels(torch.device("cpu"), torch.float32, 16, 16, softcap)
    query, keys, values = (
        3 * draw(1, 2, 3, 40, 16),
        3 * draw(1, 2, 5000, 16),
        draw(1, 2, 5000, 16, seed=1),
    )
    ours = attended(kernels, query.float(), keys.float(), values.float(), scale=0.5)
    out, lse = by_definition(query, keys, values, 0.5, None, softcap)
    torch.testing.assert_close(ours.out.double(), out, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours.lse.double(), lse, rtol=1e-5, atol=1e-5)


def test_values_may_be_narrower_than_keys() -> None:
    kernels = select_kernels(torch.device("cpu"), torch.float32, 16, 8)
    query, keys, values = draw(1, 2, 3, 5, 16), draw(1, 2, 50, 16), draw(1, 2, 50, 8)
    ours = attended(kernels, query.float(), keys.float(), values.float(), scale=0.5)
    out, _ = by_definition(query, keys, values, 0.5, None)
    torch.testing.assert_close(ours.out.double(), out, rtol=1e-4, atol=1e-5)


def test_a_kernel_that_is_wrong_here_is_not_selected(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(self: CpuKernel, work: Work) -> None:
        total, work.into = work.into, Accumulator()
        right(self, work)
        partial = work.into.result()
        total.add(Partial(partial.out, partial.lse + 1))

    right = CpuKernel.attend
    select_kernels.cache_clear()
    assert select_kernels(torch.device("cpu"), torch.float32, 8, 8).name == CpuKernel.name
    monkeypatch.setattr(CpuKernel, "attend", wrong)
    select_kernels.cache_clear()
    assert select_kernels(torch.device("cpu"), torch.float32, 8, 8).name == "reference"
    select_kernels.cache_clear()


@pytest.mark.parametrize("parts", [[50], [1, 49], [20, 0, 17, 13], [1] * 50])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_merged_parts_equal_the_whole(parts: list[int], dtype: torch.dtype) -> None:
    query, keys, values = draw(2, 2, 3, 4, 16), draw(2, 2, 50, 16), draw(2, 2, 50, 16, seed=1)
    sinks = draw(2, 3)
    total = Accumulator()
    nothing = torch.full(query.shape[:-1], -torch.inf, dtype=dtype)
    total.add(Partial(torch.zeros(query.shape, dtype=dtype), nothing))
    start = 0
    for part in parts:
        tokens = slice(start, start + part)
        tile = tile_in_hand(KV(keys[:, :, tokens].to(dtype), values[:, :, tokens].to(dtype)))
        CpuKernel().attend(Work(query.to(dtype), [tile], 0.3, total))
        start += part
    out, lse = by_definition(query, keys, values, 0.3, None)
    tolerance = TOLERANCE[dtype]
    merged = total.result()
    torch.testing.assert_close(merged.out.double(), out, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(merged.lse.double(), lse, rtol=tolerance, atol=tolerance)
    total.add_sinks(sinks)
    share = torch.sigmoid(lse - sinks[None, :, :, None]).unsqueeze(-1)
    torch.testing.assert_close(
        total.result().out.double(), out * share, rtol=tolerance, atol=tolerance
    )


@pytest.mark.covering
@pytest.mark.parametrize("window", [None, 1, 7, 512, 600, 5000])
@pytest.mark.parametrize(("q_len", "past"), [(1, 0), (1, 30), (30, 11), (1025, 37), (600, 600)])
def test_bands(window: int | None, q_len: int, past: int) -> None:
    kv_len = past + q_len
    query, keys, values = draw(1, 1, 2, q_len, 8), draw(1, 1, kv_len, 8), draw(1, 1, kv_len, 8)
    distance = torch.arange(q_len)[:, None] + past - torch.arange(kv_len)[None]
    mask = ((distance >= 0) & (distance < (window or kv_len)))[None]
    padding = torch.ones(1, 1, kv_len, dtype=torch.bool)
    padding[..., :5] = False
    for pad in (None, padding):
        tile, total = tile_in_hand(KV(keys, values)), Accumulator()
        for work in band_works(
            query, tile, scale=0.3, into=total, window_tokens=window, padding=pad
        ):
            only(CpuKernel()).pick(work).attend(work)
        ours = total.result()
        visible = mask if pad is None else mask & pad
        out, _ = by_definition(query, keys, values, 0.3, visible)
        torch.testing.assert_close(ours.out, out, rtol=1e-10, atol=1e-10)


@pytest.fixture
def fresh_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache folder, and nothing remembered of kernels built before."""

    def forget() -> None:
        for remembered in (decode_library, prefill_library, select_kernels):
            remembered.cache_clear()

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    forget()
    yield tmp_path
    forget()


needs_compiler = pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")


@needs_compiler
def test_the_native_kernels_are_compiled_once_and_chosen(
    fresh_build: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = torch.device("cpu")
    assert select_kernels(device, torch.bfloat16, 64, 64).name == NativeKernel.name
    assert decode_library(torch.bfloat16, 64, 3) is not None
    assert prefill_library(torch.bfloat16, 64) is not None
    built = {path: path.stat().st_mtime_ns for path in fresh_build.rglob("*.so")}
    assert built
    for remembered in (decode_library, prefill_library, select_kernels):
        remembered.cache_clear()
    assert select_kernels(device, torch.bfloat16, 64, 64).name == NativeKernel.name
    assert built == {path: path.stat().st_mtime_ns for path in fresh_build.rglob("*.so")}


FEATURES = {
    "-mno-amx-tile": {"amx_tile"},
    "-mno-amx-tile -mno-avx512bf16": {"amx_tile", "avx512_bf16"},
    "-mno-avx512f": {"avx512f"},
}
"""What flags leave out, by the system's names. A processor without it compiles the same code."""


def processor() -> str:
    """Return the features of this processor; nothing where the system does not tell them."""
    told = Path("/proc/cpuinfo")
    lines = told.read_text().splitlines() if told.exists() else []
    return next((line.partition(":")[2] for line in lines if line.startswith("flags")), "")


@needs_compiler
@pytest.mark.parametrize(
    ("flags", "dtype"),
    [  # those with which another code is compiled; AMX and AVX512-BF16 mean nothing to float32
        ("-mno-amx-tile", torch.bfloat16),
        ("-mno-amx-tile", torch.float16),
        ("-mno-amx-tile -mno-avx512bf16", torch.bfloat16),
        ("-mno-avx512f", torch.float32),
        ("-mno-avx512f", torch.bfloat16),
        ("-mno-avx512f", torch.float16),
    ],
)
def test_the_native_kernels_of_lesser_processors(
    fresh_build: Path, monkeypatch: pytest.MonkeyPatch, flags: str, dtype: torch.dtype
) -> None:
    if platform.machine() != "x86_64":
        pytest.skip("these flags are those of x86")
    if not FEATURES[flags] & set(processor().split()):
        pytest.skip("this processor has nothing to leave out")
    monkeypatch.setenv("CC", f"cc {flags}")
    for group, q_len, dim in ((3, 1, 64), (4, 1, 96), (13, 1, 48), (8, 2, 128), (7, 70, 64)):
        check(native(), (1, 2, group, q_len, 1037, dim), dtype, "tile")
        library = decode_library(dtype, dim, group) if q_len < 70 else prefill_library(dtype, dim)
        assert library is not None


@pytest.mark.covering
@pytest.mark.parametrize("group", [4, 12, 16])
@pytest.mark.parametrize("size", [1.0, 6e4, 3e-6])
def test_float16_is_attended_with_all_its_bits(group: int, size: float) -> None:
    """Also where the processor multiplies bfloat16 alone; from subnormals to the largest."""
    query, keys, values = (
        draw(1, 2, *rest, dtype=torch.float64).clamp(-1, 1)
        for rest in ((group, 1, 96), (333, 96), (333, 96))
    )
    query, keys, values = query / max(size, 2e-5), keys * size, values * size
    query, keys, values = query.half(), keys.half(), values.half()
    ours = attended(native(), query, keys, values, scale=0.3)
    out, lse = by_definition(query, keys, values, 0.3, None)
    assert (ours.out.double() - out).abs().max() < 5e-5 * size
    assert (ours.lse.double() - lse).abs().max() < 1e-5


@pytest.mark.covering
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("group", "q_len"), [(1, 1), (4, 1), (16, 1), (1, 70), (1, 300)])
def test_not_a_number_is_not_hidden(group: int, q_len: int, dtype: torch.dtype) -> None:
    query, keys, values = (
        draw(1, 1, *rest, dtype=dtype) for rest in ((group, q_len, 32), (900, 32), (900, 32))
    )
    keys[0, 0, 700, 3] = torch.nan
    ours = attended(native(), query, keys, values, scale=0.5)
    assert ours.out.isnan().all()
    assert ours.lse.isnan().all()


@pytest.mark.parametrize("compiler", ["/nowhere/cc", "false"])
def test_without_a_working_compiler_torch_serves(
    fresh_build: Path, monkeypatch: pytest.MonkeyPatch, compiler: str
) -> None:
    monkeypatch.setenv("CC", compiler)
    assert select_kernels(torch.device("cpu"), torch.bfloat16, 64, 64).name == CpuKernel.name
    for q_len in (1, 70):
        check(native(), (1, 2, 4, q_len, 1037, 64), torch.bfloat16, "tile")
    assert not list(fresh_build.rglob("*.so"))


@pytest.mark.parametrize("part", [0, 1, 2])
def test_mixed_dtypes_are_refused_and_never_misread(part: int) -> None:
    for q_len in (1, 70):
        query, keys, values = draw(1, 1, 1, q_len, 32), draw(1, 1, 900, 32), draw(1, 1, 900, 32)
        mixed = [tensor.float() for tensor in (query, keys, values)]
        mixed[part] = mixed[part].bfloat16()
        with pytest.raises(RuntimeError, match=r"scalar type|dtype"):
            attended(native(), *mixed, scale=0.5)


@pytest.mark.parametrize(("group", "q_len"), [(1, 1), (16, 1), (1, 70)])
def test_the_dtype_and_device_new_tensors_have_by_default_do_not_matter(
    group: int, q_len: int
) -> None:
    past = (1, 2, 90, 64)
    parts = tuple(draw(*shape).float() for shape in ((1, 2, group, q_len, 64), past, past))
    expected = attended(native(), *parts, scale=0.3)
    torch.set_default_dtype(torch.float64)  # smaller ones would have it write past the end
    try:
        with torch.device("meta"):
            got = attended(native(), *parts, scale=0.3)
    finally:
        torch.set_default_dtype(torch.float32)
    assert (got.out.dtype, got.lse.dtype) == (torch.float32, torch.float32)
    assert torch.equal(got.out, expected.out)
    assert torch.equal(got.lse, expected.lse)


@pytest.mark.parametrize(("group", "q_len"), [(1, 1), (16, 1), (1, 70)])
def test_weights_too_small_to_matter_are_nothing(group: int, q_len: int) -> None:
    """Where one score outweighs all others, none of them may show in the sum."""
    query, keys, values = draw(1, 1, group, q_len, 32), draw(1, 1, 900, 32), draw(1, 1, 900, 32)
    query[...] = 0
    query[..., 0] = 1
    keys[0, 0, :, 0] = -100
    keys[0, 0, 400, 0] = 0
    ours = attended(native(), query.float(), keys.float(), values.float(), scale=1.0)
    assert torch.equal(ours.out, values[:, :, None, 400:401].float().expand_as(ours.out))
    assert not ours.lse.any()


def test_each_call_goes_to_its_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the reference in place of a GPU's operators."""
    asked = []

    def operator(name: str) -> FusedCall:
        def call(query, keys, values, /, *, scale):
            asked.append(name)
            partial = attended(reference(), query.unsqueeze(2), keys, values, scale=scale)
            # As torch's operators have it: rows of the LSE that mean nothing, and more results.
            lse = torch.nn.functional.pad(partial.lse[:, :, 0], (0, 3), value=torch.nan)
            return partial.out[:, :, 0], lse, None

        return call

    properties = SimpleNamespace(multi_processor_count=4)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _device: properties)
    kernel = CudaKernel(
        "operators",
        torch.device("cuda"),
        tile=operator("tile"),
        small=operator("few"),
        square=operator("square"),
    )
    for q_len, kv_len, name in [(35, 20, "tile"), (35, 1, "few"), (32, 4000, "few")]:
        asked.clear()
        query, keys = draw(1, 3, 2, q_len, 8), draw(1, 3, kv_len, 8)
        ours = attended(only(kernel), query, keys, keys, scale=0.3)
        assert set(asked) == {name}
        out, lse = by_definition(query, keys, keys, 0.3, None)
        torch.testing.assert_close(ours.out, out)
        torch.testing.assert_close(ours.lse, lse)


def prepared_table(
    monkeypatch: pytest.MonkeyPatch, asked: list[str], *, least_pairs: int, off: float = 0.0
) -> Kernels:
    """Return a kernel that has to prepare, and one that has not, which note what they are asked.

    Args:
        monkeypatch: the test's.
        asked: to which the operators' names are added.
        least_pairs: from which the first is worth it.
        off: by how much it errs.
    """

    def operator(name: str, causal: bool) -> FusedCall:
        def call(query, keys, values, /, *, scale):
            asked.append(name)
            at = query.unsqueeze(2)
            partial = attended(reference(), at, keys, values, scale=scale, causal=causal)
            error = off if name == "prepared" else 0.0
            return partial.out[:, :, 0] + error, partial.lse[:, :, 0]

        return call

    properties = SimpleNamespace(multi_processor_count=4)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _device: properties)
    tile = {name: operator(name, False) for name in ("prepared", "other")}
    square = {name: operator(name, True) for name in ("prepared", "other")}
    device = torch.device("cpu")
    prepared = CudaKernel(
        "prepared",
        device,
        tile=tile["prepared"],
        square=square["prepared"],
        small=tile["other"],
        least_pairs=least_pairs,
    )
    other = CudaKernel("other", device, tile=tile["other"], square=square["other"])
    return Kernels([prepared, other], [ReferenceKernel()])


def test_what_has_to_prepare_serves_where_that_is_worth_it(monkeypatch) -> None:
    asked: list[str] = []
    kernels = prepared_table(monkeypatch, asked, least_pairs=2 * 33 * 32)
    assert kernels.name == "prepared and other"

    def serving(q_len: int, *kv_lens: int, **options: Any) -> list[str]:
        asked.clear()
        query = draw(1, 1, 2, q_len, 8)
        keys = [draw(1, 1, kv_len, 8) for kv_len in kv_lens]
        total = Accumulator()
        work = Work(query, [tile_in_hand(KV(part, part)) for part in keys], 0.3, total, **options)
        kernels.pick(work).attend(work)
        if not options:
            all_keys = torch.cat(keys, dim=2)
            out, _ = by_definition(query, all_keys, all_keys, 0.3, None)
            torch.testing.assert_close(total.result().out, out)
        return asked[:]

    mask = torch.ones(1, 1, 33, dtype=torch.bool)
    assert serving(33, 31) == serving(16, 16, causal=True) == ["other"]
    assert serving(33, 33, mask=mask) == []  # the reference serves
    assert "prepared" in serving(33, 32)  # it was checked, too
    assert serving(33, 32) == ["prepared"]
    assert serving(35, 40) == ["prepared", "prepared"]  # 32 and 8 tokens
    assert serving(35, 37) == ["prepared", "prepared", "other"]
    assert serving(64, 9) == ["prepared", "other"]  # as many queries as in other chunks
    assert serving(65, 9) == ["other"]
    assert serving(33, 31, 32, 5) == ["other", "prepared", "other"]  # each tile as it is worth
    assert serving(64, 64, causal=True) == serving(128, 128, causal=True) == ["prepared"]
    assert serving(39, 39, causal=True) == ["other"]  # a length that will hardly come again
    assert serving(40, 40, causal=True) == serving(63, 63, causal=True) == ["prepared"]
    assert serving(32, 32, causal=True) == serving(16, 16, causal=True, past_tokens=50) == ["other"]
    assert serving(32, 32, causal=True, past_tokens=1) == ["prepared"]  # in a long prompt
    assert serving(8, 8, causal=True, past_tokens=500) == ["other"]


def test_the_check_of_what_has_to_prepare_waits_for_the_first_such_work(monkeypatch) -> None:
    asked: list[str] = []
    kernels = prepared_table(monkeypatch, asked, least_pairs=2 * 33 * 32)
    attended(kernels, draw(1, 1, 2, 33, 8), draw(1, 1, 31, 8), draw(1, 1, 31, 8), scale=0.3)
    assert asked == ["other"]
    attended(kernels, draw(1, 1, 2, 33, 8), draw(1, 1, 32, 8), draw(1, 1, 32, 8), scale=0.3)
    assert asked.count("prepared") > 1


def test_what_fails_its_check_at_its_first_call_serves_none(monkeypatch, caplog) -> None:
    kernels = prepared_table(monkeypatch, [], least_pairs=1, off=1.0)
    query, keys = draw(1, 1, 2, 40, 8), draw(1, 1, 32, 8)
    for _ in range(2):
        ours = attended(kernels, query, keys, keys, scale=0.3)
        torch.testing.assert_close(ours.out, by_definition(query, keys, keys, 0.3, None)[0])
        assert kernels.name == "other"
    assert caplog.messages == ["prepared fails its check here; another kernel is used"]


def test_an_operator_that_torch_has_not_is_found_out(monkeypatch) -> None:
    properties = SimpleNamespace(multi_processor_count=4)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _device: properties)
    device, none = torch.device("cpu"), operator("none_attention", is_causal=False)
    kernel = CudaKernel("none", device, tile=none, square=none)
    assert not agrees(only(kernel), device, torch.float32, 16)
    assert agrees(reference(), device, torch.float32, 16)


@pytest.mark.parametrize("splits", range(1, 12))
def test_splits_of_a_tile_merge_to_the_whole(splits: int) -> None:
    query, keys, values = draw(1, 3, 5, 8), draw(1, 3, 47, 8), draw(1, 3, 47, 8, seed=1)

    def call(query, keys, values, /, *, scale):
        partial = attended(reference(), query.unsqueeze(2), keys, values, scale=scale)
        return partial.out[:, :, 0], partial.lse[:, :, 0]

    ours = attend_split(call, query, keys, values, 0.3, splits, group=1)
    out, lse = by_definition(query.unsqueeze(2), keys, values, 0.3, None)
    torch.testing.assert_close(ours.out, out)
    torch.testing.assert_close(ours.lse, lse)


@pytest.mark.parametrize(
    "kernels", [native(), only(CpuKernel()), reference()], ids=lambda k: k.name
)
def test_several_tiles_of_some_heads_and_tokens(kernels: Kernels) -> None:
    """Each lies somewhere in memory that holds more."""
    memory = KV(draw(2, 5, 900, 32).float(), draw(2, 5, 900, 32, seed=1).float())
    whole = tile_in_hand(memory)
    for q_len, heads in ((1, slice(1, 3)), (3, slice(0, 5)), (60, slice(3, 5))):
        query = draw(2, heads.stop - heads.start, 2, q_len, 32).float()
        parts = [(0, 0), (7, 640), (647, 1), (899, 1)]
        tiles = [whole._replace(first=at, tokens=n, heads=heads) for at, n in parts]
        total = Accumulator()
        work = Work(query, tiles, 0.3, total)
        kernels.pick(work).attend(work)
        seen = torch.cat([torch.arange(at, at + n) for at, n in parts])
        keys, values = (part[:, heads, seen] for part in memory)
        out, lse = by_definition(query, keys, values, 0.3, None)
        torch.testing.assert_close(total.result().out.double(), out, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(total.result().lse.double(), lse, rtol=1e-5, atol=1e-5)


def test_without_a_tile_the_result_is_zero() -> None:
    out = torch.ones(1, 2, 1, 1, 8)
    total = reference().begin(draw(1, 1, 1, 2, 8), scale=1.0)
    total.add_sinks(torch.zeros(1, 1))
    total.write(out)
    assert not out.any()


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("fault", ["attend", "merge", "decode", "place"])
def test_a_kernel_that_errs_in_one_kind_of_call_is_not_chosen(fault, dtype, monkeypatch):
    class Faulty(Kernels):
        """Right but for one kind of call."""

        def __init__(self, *_kernels: object) -> None:
            super().__init__([Named()])

        def begin(self, query, *, scale):
            return FaultyTotal() if fault == "merge" and query.shape[3] > 1 else Accumulator()

        def decode(self, work):
            super().decode(work)
            if fault == "decode":
                work.out += 1
            elif fault == "place":
                work.tiles[0].kv.keys[:, :, -1] += 1

    class FaultyTotal(Accumulator):
        """Wrong in the end."""

        def write(self, out):
            super().write(out)
            out += 1

    class Named(ReferenceKernel):
        """Wrong in its LSE."""

        def attend(self, work):
            total, work.into = work.into, Accumulator()
            super().attend(work)
            partial = work.into.result()
            total.add(Partial(partial.out, partial.lse + (fault == "attend")))

    monkeypatch.setattr(select, "Kernels", Faulty)
    monkeypatch.setattr(select, "decode_library", lambda *_kind: None)
    monkeypatch.setattr(select, "agrees_here", noting := Noting(select.agrees_here))
    select_kernels.__wrapped__(torch.device("cpu"), dtype, 16, 16)
    fault = ""
    select_kernels.__wrapped__(torch.device("cpu"), dtype, 16, 16)
    assert noting.answers == [False, True]


class Noting:
    """Notes what a function returns."""

    def __init__(self, function):
        self.function, self.answers = function, []

    def __call__(self, *arguments):
        self.answers.append(self.function(*arguments))
        return self.answers[-1]
