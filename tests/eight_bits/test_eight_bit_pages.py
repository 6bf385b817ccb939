"""Pages in 8 bits: how far values are off, and what is kept as it is."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from eight_bit_values import KINDS, drawn, keep_raw, unpacked
from headinfer.eight_bits.codec import CpuEightBits, agrees, codec_for
from headinfer.eight_bits.layout import Code, EightBitLayout
from headinfer.eight_bits.reference import kept_as_they_are, pack
from headinfer.packed.layout import PAGE_TOKENS

CPU = torch.device("cpu")
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
codes, dtypes = st.sampled_from(list(Code)), st.sampled_from(DTYPES)
shapes = st.tuples(
    st.integers(1, 2), st.integers(1, 2), st.integers(1, 150), st.sampled_from([16, 48])
)


@settings(max_examples=40, deadline=None)
@given(codes, shapes, st.sampled_from(KINDS), dtypes, st.integers(0, 2**31))
def test_values_are_near_and_those_of_other_pages_are_the_same(
    code: Code,
    shape: tuple[int, int, int, int],
    kind: str,
    dtype: torch.dtype,
    seed: int,
) -> None:
    """A page that is not full or has a number that does not fit comes back to the last bit."""
    values = drawn(kind, shape, seed, dtype)
    pages = pack(code, values)
    kept = keep_raw(code, pages, values)
    back = unpacked(code, pages, values)
    by_one_thread = torch.empty_like(values)
    CpuEightBits(code, alone=True).unpack(pages, by_one_thread)
    assert torch.equal(by_one_thread.view(torch.uint8), back.view(torch.uint8))
    raw = kept_as_they_are(pages, EightBitLayout(code, shape[-1]))
    as_it_is = raw.repeat_interleave(PAGE_TOKENS, 2)[:, :, : shape[2]]
    ints = torch.int32 if dtype is torch.float32 else torch.int16
    assert torch.equal(back[as_it_is].view(ints), values[as_it_is].view(ints))
    assert raw[..., -1].all() or shape[2] % PAGE_TOKENS == 0
    for row, head, page in (~raw).nonzero().tolist():
        tokens = slice(page * PAGE_TOKENS, (page + 1) * PAGE_TOKENS)
        wanted, got = (part[row, head, tokens].double() for part in (values, back))
        assert got.isfinite().all()
        most = wanted.abs().amax(0) if code is Code.INT8 else wanted.abs().amax()
        within = most / 127 * 0.51 if code is Code.INT8 else most / 448 * 2**-9 + wanted.abs() / 15
        rounded = wanted.abs() * torch.finfo(dtype).eps + torch.finfo(torch.bfloat16).tiny * 448
        assert ((got - wanted).abs() <= within + rounded).all()
    del kept


@pytest.mark.parametrize("code", Code)
@pytest.mark.parametrize("wrong", [torch.nan, torch.inf, -torch.inf])
def test_numbers_that_are_not_finite_come_back(code: Code, wrong: float) -> None:
    values = drawn("normal", (1, 1, 2 * PAGE_TOKENS, 16))
    values[0, 0, 70, 3] = wrong
    pages = pack(code, values)
    assert kept_as_they_are(pages, EightBitLayout(code, 16)).flatten().tolist() == [False, True]
    kept = keep_raw(code, pages, values)
    back = unpacked(code, pages, values)
    assert torch.equal(back[:, :, PAGE_TOKENS:].nan_to_num(7), values[:, :, 64:].nan_to_num(7))
    assert back[:, :, :PAGE_TOKENS].isfinite().all()
    del kept


def test_sizes() -> None:
    """A million tokens of Llama-3-8B's shape take 66 GiB, scales included."""
    layout = EightBitLayout(Code.INT8, 128)
    assert 2**20 // PAGE_TOKENS * 32 * 8 * 2 * layout.page_bytes == 66 * 2**30
    assert all(EightBitLayout(code, dim).page_bytes % 16 == 0 for code in Code for dim in (16, 80))
    assert EightBitLayout(Code.FP8, 128).page_bytes < layout.page_bytes


@pytest.mark.parametrize("code", Code)
def test_a_codec_is_compared_with_the_reference(code: Code) -> None:
    class Coarse(CpuEightBits):
        """Gives other values than the reference."""

        def unpack(self, pages, values, first=0, counted=None):
            super().unpack(pages, values, first, counted)
            values *= 1.01

    for dim in (48, 128):
        assert agrees(code, codec_for(code, CPU), CPU, torch.float16, dim)
        assert not agrees(code, Coarse(code), CPU, torch.float16, dim)
