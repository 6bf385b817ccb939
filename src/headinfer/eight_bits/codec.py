"""What rounds to 8 bits and back on a device, and the choice for each kind of device."""

from collections.abc import Iterator
from itertools import product

import torch

from headinfer.eight_bits import reference
from headinfer.eight_bits.layout import Code, EightBitLayout
from headinfer.packed.codec import Codec, gives, raw_copies, without_triton
from headinfer.packed.layout import PAGE_TOKENS, num_pages

_ONE_THREADS_ELEMENTS = 2**15 - 1
"""torch shares an operation on more elements among its threads."""


class CpuEightBits:
    """A codec of 8 bits for tensors in memory of the CPU, by torch.

    Args:
        code: of 8 bits.
        alone: whether values are given by the thread that asks, and not by torch's threads.
    """

    def __init__(self, code: Code, *, alone: bool = False) -> None:
        self._code = code
        self._alone = alone

    def pack(self, values: torch.Tensor, pages: torch.Tensor) -> None:
        """Round values; see `reference.pack`."""
        reference.pack(self._code, values, pages)

    def unpack(
        self,
        pages: torch.Tensor,
        values: torch.Tensor,
        first: int = 0,
        counted: torch.Tensor | None = None,
    ) -> None:
        """Give values of pages; see `Codec.unpack`."""
        tokens = values.shape[2]
        if counted is not None:
            tokens = min(first + int(counted.item()), tokens)
        values = values[:, :, :tokens]
        for part, place in _in_pieces(pages, values) if self._alone else ((pages, values),):
            reference.unpack(self._code, part, place)

    def keep_raw(
        self, values: torch.Tensor, pages: torch.Tensor, raw: torch.Tensor, taken: torch.Tensor
    ) -> None:
        """Copy the values of pages that are kept as they are; see `Codec.keep_raw`."""
        kept = self.overflowed(pages, values.shape[3])
        for place, address in raw_copies(values, kept, raw, taken):
            reference.set_raw_address(pages[place], address)

    def overflowed(self, pages: torch.Tensor, dim: int) -> torch.Tensor:
        """Return which pages are kept as they are, bool `[batch, heads, pages]`."""
        return reference.kept_as_they_are(pages, EightBitLayout(self._code, dim))


def _in_pieces(
    pages: torch.Tensor, values: torch.Tensor
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield pages of one head and their values, of as few elements as one thread takes."""
    batch, heads, tokens, dim = values.shape
    count = max(1, _ONE_THREADS_ELEMENTS // (PAGE_TOKENS * dim))
    for row, head, page in product(range(batch), range(heads), range(0, num_pages(tokens), count)):
        part = pages[row : row + 1, head : head + 1, page : page + count]
        first, end = page * PAGE_TOKENS, (page + count) * PAGE_TOKENS
        yield part, values[row : row + 1, head : head + 1, first:end]


_CHECKED = 2, 2, 2 * PAGE_TOKENS  # rows, heads and tokens


def codec_for(code: Code, where: torch.device) -> Codec:
    """Return the codec of a code for tensors on a device.

    Raises:
        OptionError: there is none.
    """
    if where.type == "cpu":
        return CpuEightBits(code)
    try:
        from headinfer.eight_bits.fused import TritonEightBits
    except ImportError:
        raise without_triton(code.value, where) from None
    return TritonEightBits(code)


def agrees(code: Code, codec: Codec, where: torch.device, dtype: torch.dtype, dim: int) -> bool:
    """Whether a codec gives the reference's pages on a device, and its values of them.

    Args:
        code: of 8 bits.
        codec: tried there.
        where: the device.
        dtype: of the values.
        dim: elements of a value.
    """
    generator = torch.Generator("cpu").manual_seed(0)
    values = torch.randn(*_CHECKED, dim, generator=generator, device="cpu").to(dtype)
    wanted, unpacked = reference.pack(code, values), torch.zeros_like(values)
    reference.unpack(code, wanted, unpacked)
    return gives(codec, where, values, wanted, unpacked)
