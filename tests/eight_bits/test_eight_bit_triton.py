"""Rounding to 8 bits and back by Triton: on a GPU, or in Triton's interpreter without one."""

import importlib.util

import pytest
import torch

from eight_bit_values import KINDS, drawn, unpacked
from headinfer.eight_bits.layout import Code, EightBitLayout
from headinfer.eight_bits.reference import kept_as_they_are, pack
from headinfer.packed.layout import PAGE_TOKENS

if importlib.util.find_spec("triton") is None:
    pytest.skip("no Triton", allow_module_level=True)
from headinfer.eight_bits.fused import TritonEightBits

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
pytestmark = pytest.mark.gpu if ON_GPU else pytest.mark.usefixtures("patch_once")
SHAPES = [(2, 2, 150, 64), (1, 3, 1, 80), (1, 2, 200, 128), (1, 1, 70, 256), (1, 1, 130, 512)]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@pytest.mark.covering
@pytest.mark.parametrize("code", Code)
@pytest.mark.parametrize("shape", SHAPES if ON_GPU else [(1, 2, 150, 48)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS if ON_GPU else ["outliers", "special"])
def test_pages_and_values_are_the_references(
    code: Code, kind: str, shape: tuple[int, int, int, int], dtype: torch.dtype
) -> None:
    """Pages that are kept as they are take slots of memory that the CPU has, too."""
    codec, values, dim = TritonEightBits(code), drawn(kind, shape, 0, dtype), shape[-1]
    there, wanted = values.to(DEVICE), pack(code, values)
    pages = torch.full_like(wanted, 7, device=DEVICE)
    codec.pack(there, pages)
    assert torch.equal(pages.cpu(), wanted)
    count = int(kept_as_they_are(wanted, EightBitLayout(code, dim)).sum())
    slot_bytes = PAGE_TOKENS * dim * dtype.itemsize
    raw = torch.full((count + 1, slot_bytes), 7, dtype=torch.uint8)
    raw = raw.pin_memory() if ON_GPU else raw
    taken = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    codec.keep_raw(there, pages, raw, taken)
    assert int(taken) == count
    assert (raw[count:] == 7).all()
    back = torch.zeros_like(there)
    codec.unpack(pages, back)
    ints = torch.int32 if dtype is torch.float32 else torch.int16
    assert torch.equal(back.cpu().view(ints), unpacked(code, pages.cpu(), values).view(ints))


def test_pages_are_written_and_read_where_they_lie() -> None:
    codec = TritonEightBits(Code.INT8)
    values = drawn("normal", (2, 128, 1, 16)).to(DEVICE).transpose(1, 2)
    page_bytes = EightBitLayout(Code.INT8, 16).page_bytes
    memory = torch.full((2, 3, 5, page_bytes), 7, dtype=torch.uint8, device=DEVICE)
    cut = memory[:, 1:2, 2:4]
    codec.pack(values, cut)
    assert torch.equal(cut.cpu(), pack(Code.INT8, values.cpu()))
    assert (memory[:, 0] == 7).all()
    assert (memory[:, 1:2, :2] == 7).all()
    target = torch.zeros(2, 1, 128, 32, dtype=torch.bfloat16, device=DEVICE)
    codec.unpack(cut, target[..., :16])
    assert torch.equal(target[..., :16].cpu(), unpacked(Code.INT8, cut.cpu(), values.cpu()))
    assert not target[..., 16:].any()


def test_tokens_that_do_not_matter_are_left_alone() -> None:
    """These are pages before the first token, and tokens behind the last that is counted."""
    codec = TritonEightBits(Code.INT8)
    values = drawn("normal", (1, 1, 4 * PAGE_TOKENS, 16)).to(DEVICE)
    pages = pack(Code.INT8, values)
    back = torch.zeros_like(values)
    counted = torch.tensor([50], device=DEVICE)
    codec.unpack(pages, back, first=100, counted=counted)
    whole, first = unpacked(Code.INT8, pages, values), 100 // PAGE_TOKENS * PAGE_TOKENS
    assert torch.equal(back[:, :, first:150], whole[:, :, first:150])
    assert not back[:, :, :first].any()
    assert not back[:, :, 150:].any()
