"""Rounding to 8 bits and back on CUDA, each in one launch, by Triton's programs."""

import torch

from headinfer.eight_bits.layout import Code, EightBitLayout
from headinfer.eight_bits.reference import kept_as_they_are, largest_kept
from headinfer.eight_bits.triton_eight_bits import pack_pages, unpack_pages
from headinfer.native.triton_launch import Program, power_of_2
from headinfer.packed.keeping import keep_raw
from headinfer.packed.layout import PAGE_TOKENS, num_pages

_AT_ONCE = 4096
"""Values that a program unpacks at a time."""

_UNPACK = Program(unpack_pages, num_warps=4)
_PACK = Program(pack_pages, num_warps=8)


class TritonEightBits:
    """A codec of 8 bits, enqueued on the stream that is current.

    Args:
        code: of 8 bits.
    """

    def __init__(self, code: Code) -> None:
        self._code = code

    def pack(self, values: torch.Tensor, pages: torch.Tensor) -> None:
        """Round values `[batch, heads, tokens, dim]` with a unit last stride into pages."""
        batch, heads, tokens, dim = values.shape
        _PACK.launch(
            (num_pages(tokens), batch * heads, 1),
            (values, pages),
            (tokens, heads, largest_kept(values.dtype)),
            (*values.stride()[:3], *pages.stride()[:3]),
            (
                *(dim, power_of_2(dim), EightBitLayout(self._code, dim).page_bytes),
                self._code is Code.INT8,
            ),
        )

    def unpack(
        self,
        pages: torch.Tensor,
        values: torch.Tensor,
        first: int = 0,
        counted: torch.Tensor | None = None,
    ) -> None:
        """Give values of pages; see `Codec.unpack`.

        Those of pages that are kept as they are are read where they lie, in memory that the device
        can address.
        """
        batch, heads, tokens, dim = values.shape
        width = power_of_2(dim)
        block = max(min(_AT_ONCE // width, PAGE_TOKENS), 1)
        _UNPACK.launch(
            (num_pages(tokens) * (PAGE_TOKENS // block), batch * heads, 1),
            (pages, values, pages if counted is None else counted),
            (tokens, first, heads),
            (*pages.stride()[:3], *values.stride()[:3]),
            (dim, width, self._code is Code.INT8, counted is not None, block),
        )

    def keep_raw(
        self, values: torch.Tensor, pages: torch.Tensor, raw: torch.Tensor, taken: torch.Tensor
    ) -> None:
        """Copy the values of pages that are kept as they are; see `Codec.keep_raw`."""
        flag = EightBitLayout(self._code, values.shape[3]).raw_flag
        keep_raw(values, pages, raw, taken, flag)

    def overflowed(self, pages: torch.Tensor, dim: int) -> torch.Tensor:
        """Return which pages are kept as they are, bool `[batch, heads, pages]`."""
        return kept_as_they_are(pages, EightBitLayout(self._code, dim))
