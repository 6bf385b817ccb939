"""Packing and unpacking on CUDA, each in one launch, by Triton's programs."""

import torch

from headinfer.native.triton_launch import Program, power_of_2
from headinfer.packed.keeping import keep_raw
from headinfer.packed.layout import PageLayout, num_pages
from headinfer.packed.reference import overflowed
from headinfer.packed.triton_pages import pack_pages, unpack_pages

_AT_ONCE = 1024
"""Codes that a program handles at a time: 8 for each of its threads.

Measured beside an H200, a tile of 32K tokens x 8 heads x 128, bytes read and written:

- 1024 codes at a time: 3.03 TB/s unpacked
- 2048 codes at a time: 3.09 TB/s, and the programs take twice as long to compile

The first packed prompt on a machine waits for the compiler.
"""

_UNPACK = Program(unpack_pages, num_warps=4)
_PACK = Program(pack_pages, num_warps=4)


class TritonCodec:
    """A packer of keys or values into pages, enqueued on the stream that is current."""

    def pack(self, values: torch.Tensor, pages: torch.Tensor) -> None:
        """Pack values; see `reference.pack`.

        Args:
            values: `[batch, heads, tokens, dim]` of bfloat16, any strides with a unit last one.
            pages: `[batch, heads, pages, page_bytes]` of uint8, likewise; written.
        """
        batch, heads, tokens, dim = values.shape
        layout = PageLayout(dim)
        area_bytes = layout.page_bytes - layout.header_at
        _PACK.launch(
            (num_pages(tokens), batch * heads, 1),
            (values.view(torch.int16), pages),
            (tokens, heads),
            (*values.stride()[:3], *pages.stride()[:3]),
            (
                *(dim, layout.max_escapes, area_bytes),
                *(_block(dim), power_of_2(area_bytes)),
            ),
        )

    def unpack(
        self,
        pages: torch.Tensor,
        values: torch.Tensor,
        first: int = 0,
        counted: torch.Tensor | None = None,
    ) -> None:
        """Unpack pages into values.

        Values of pages that have overflowed are read where they lie, in memory that the device can
        address.

        Args:
            pages: `[batch, heads, pages, page_bytes]` of uint8.
            values: `[batch, heads, tokens, dim]` of bfloat16, the tokens from the first page's
                first on; written.
            first: index of the first token that matters. Pages before it are left alone.
            counted: `[1]` of int64 on the device: how many tokens from there on there are when this
                runs. Pages without any are left alone. None where all are there.
        """
        batch, heads, tokens, dim = values.shape
        layout = PageLayout(dim)
        block = _block(dim)
        _UNPACK.launch(
            (num_pages(tokens) * (layout.values // 2 // block), batch * heads, 1),
            (pages, values.view(torch.int16), pages if counted is None else counted),
            (tokens, first, heads),
            (*pages.stride()[:3], *values.stride()[:3]),
            (
                *(dim, layout.max_escapes, counted is not None),
                *(block, power_of_2(layout.max_escapes)),
            ),
        )

    def keep_raw(
        self, values: torch.Tensor, pages: torch.Tensor, raw: torch.Tensor, taken: torch.Tensor
    ) -> None:
        """Copy the values of pages that have overflowed; see `keeping.keep_raw`."""
        flag = PageLayout(values.shape[3]).raw_flag
        keep_raw(values.view(torch.int16), pages, raw, taken, flag)

    def overflowed(self, pages: torch.Tensor, dim: int) -> torch.Tensor:
        """Return which pages have overflowed, bool `[batch, heads, pages]`."""
        return overflowed(pages, dim)


def _block(dim: int) -> int:
    """Return a power of two that divides half of a page's values."""
    half = PageLayout(dim).values // 2
    return min(half & -half, _AT_ONCE)
