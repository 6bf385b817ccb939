"""Packing and unpacking by Triton: on a GPU, or in Triton's interpreter without one."""

import importlib.util

import pytest
import torch

from headinfer.packed.layout import PAGE_TOKENS, PageLayout
from headinfer.packed.reference import overflowed, pack, unpack
from packed_values import KINDS, bits_of, drawn

if importlib.util.find_spec("triton") is None:
    pytest.skip("no Triton", allow_module_level=True)
from headinfer.packed.fused import TritonCodec

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
pytestmark = pytest.mark.gpu if ON_GPU else pytest.mark.usefixtures("patch_once")
SHAPES = [(2, 2, 150, 64), (1, 3, 1, 80), (1, 2, 200, 128), (1, 1, 70, 256), (1, 1, 130, 512)]


@pytest.mark.parametrize("shape", SHAPES if ON_GPU else [(1, 2, 70, 48)], ids=str)
@pytest.mark.parametrize("kind", KINDS if ON_GPU else ["full", "one too many"])
def test_pages_are_the_references_and_every_bit_comes_back(
    kind: str, shape: tuple[int, int, int, int]
) -> None:
    """Pages that overflow take slots of memory that the CPU has, too."""
    codec, values = TritonCodec(), drawn(kind, shape)
    there, wanted, dim = values.to(DEVICE), pack(values), shape[-1]
    pages = torch.full_like(wanted, 7, device=DEVICE)
    codec.pack(there, pages)
    assert torch.equal(pages.cpu(), wanted)
    count = int(overflowed(wanted, dim).sum())
    raw = torch.full((count + 1, PageLayout(dim).raw_bytes), 7, dtype=torch.uint8)
    raw = raw.pin_memory() if ON_GPU else raw
    taken = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    codec.keep_raw(there, pages, raw, taken)
    assert int(taken) == count
    assert (raw[count:] == 7).all()
    back = torch.zeros_like(there)
    codec.unpack(pages, back)
    assert torch.equal(bits_of(back.cpu()), bits_of(values))
    assert torch.equal(bits_of(unpack(pages.cpu(), dim, shape[2])), bits_of(values))


def test_pages_are_written_and_read_where_they_lie() -> None:
    codec, values = TritonCodec(), drawn("special", (2, 70, 1, 16)).to(DEVICE).transpose(1, 2)
    memory = torch.full((2, 3, 5, PageLayout(16).page_bytes), 7, dtype=torch.uint8, device=DEVICE)
    cut = memory[:, 1:2, 2:4]
    codec.pack(values, cut)
    assert torch.equal(cut.cpu(), pack(values.cpu()))
    assert (memory[:, 0] == 7).all()
    assert (memory[:, 1:2, :2] == 7).all()
    target = torch.zeros(2, 1, 70, 32, dtype=torch.bfloat16, device=DEVICE)
    codec.unpack(cut, target[..., :16])
    assert torch.equal(bits_of(target[..., :16]), bits_of(values))
    assert not target[..., 16:].any()


def test_tokens_that_do_not_matter_are_left_alone() -> None:
    """These are pages before the first token, and tokens behind the last that is counted."""
    codec, values = TritonCodec(), drawn("normal", (1, 1, 4 * PAGE_TOKENS, 16)).to(DEVICE)
    pages = torch.empty_like(pack(values.cpu()), device=DEVICE)
    codec.pack(values, pages)
    back = torch.zeros_like(values)
    counted = torch.tensor([50], device=DEVICE)
    codec.unpack(pages, back, first=100, counted=counted)
    first = 100 // PAGE_TOKENS * PAGE_TOKENS
    assert torch.equal(back[:, :, first:150], values[:, :, first:150])
    assert not back[:, :, :first].any()
    assert not back[:, :, 150:].any()
