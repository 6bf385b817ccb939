"""What packs and unpacks on a device: one protocol, and the choice for each kind of device."""

from collections.abc import Iterator
from typing import Protocol

import torch

from headinfer.errors import OptionError
from headinfer.packed import reference
from headinfer.packed.layout import PAGE_TOKENS
from headinfer.packed.native import pack_native, pages_library, unpack_native


class Codec(Protocol):
    """A packer of keys or values into pages, enqueued on the stream that is current."""

    def pack(self, values: torch.Tensor, pages: torch.Tensor) -> None:
        """Pack values `[batch, heads, tokens, dim]`; see `reference.pack`."""

    def unpack(
        self,
        pages: torch.Tensor,
        values: torch.Tensor,
        first: int = 0,
        counted: torch.Tensor | None = None,
    ) -> None:
        """Unpack pages into values.

        Args:
            pages: `[batch, heads, pages, page_bytes]` of uint8.
            values: `[batch, heads, tokens, dim]` of bfloat16, the tokens from the first page's
                first on; written.
            first: index of the first token that matters.
            counted: `[1]` of int64 where the values are: how many tokens from there on there are
                when this runs. Pages without any are not looked at. None where all are there.
        """

    def keep_raw(
        self, values: torch.Tensor, pages: torch.Tensor, raw: torch.Tensor, taken: torch.Tensor
    ) -> None:
        """Copy the values of pages that have overflowed, and write into these where the copies are.

        Args:
            values: as they were packed.
            pages: as they were packed.
            raw: `[slots, slot_bytes]` of uint8 in memory of the CPU, as the device addresses it.
            taken: `[1]` of int64 where the values are: slots that are taken; counted up.
        """

    def overflowed(self, pages: torch.Tensor, dim: int) -> torch.Tensor:
        """Return which pages have overflowed, bool `[batch, heads, pages]`."""


def raw_copies(
    values: torch.Tensor, kept: torch.Tensor, raw: torch.Tensor, taken: torch.Tensor
) -> Iterator[tuple[tuple[int, int, int], int]]:
    """Copy the values of some pages into slots, by the CPU; yield each page and its copy's address.

    Args:
        values: `[batch, heads, tokens, dim]`.
        kept: bool `[batch, heads, pages]`: which pages.
        raw: `[slots, slot_bytes]` of uint8; a slot behind the values is zeros.
        taken: `[1]` of int64: slots that are taken; counted up.
    """
    for row, head, page in kept.nonzero().tolist():
        first = page * PAGE_TOKENS
        part = values[row, head, first : first + PAGE_TOKENS].contiguous()
        slot = raw[int(taken.item())]
        slot.zero_()
        slot[: part.nbytes].copy_(part.view(torch.uint8).flatten())
        yield (row, head, page), slot.data_ptr()
        taken += 1


class CpuCodec:
    """A codec for tensors in memory of the CPU: in C where that can be had, else by torch.

    Args:
        threads: that share the work in C; as many as torch is set to by default.
    """

    def __init__(self, threads: int | None = None) -> None:
        self._threads = threads

    def pack(self, values: torch.Tensor, pages: torch.Tensor) -> None:
        """Pack values."""
        library = pages_library(values.shape[3])
        if library is None or values.stride(3) != 1:
            reference.pack(values, pages)
        else:
            pack_native(library, values, pages, self._threads)

    def unpack(
        self,
        pages: torch.Tensor,
        values: torch.Tensor,
        first: int = 0,
        counted: torch.Tensor | None = None,
    ) -> None:
        """Unpack pages into values."""
        tokens, dim = values.shape[2:]
        if counted is not None:
            tokens = min(first + int(counted.item()), tokens)
        library, values = pages_library(dim), values[:, :, :tokens]
        if library is None or values.stride(3) != 1:
            reference.unpack(pages, dim, tokens, values)
        else:
            unpack_native(library, pages, values, self._threads)

    def keep_raw(
        self, values: torch.Tensor, pages: torch.Tensor, raw: torch.Tensor, taken: torch.Tensor
    ) -> None:
        """Copy the values of pages that have overflowed."""
        dim = values.shape[3]
        for place, address in raw_copies(values, self.overflowed(pages, dim), raw, taken):
            reference.set_raw_address(pages[place], dim, address)

    def overflowed(self, pages: torch.Tensor, dim: int) -> torch.Tensor:
        """Return which pages have overflowed."""
        return reference.overflowed(pages, dim)


_CHECKED = 2, 2, 150  # rows, heads and tokens


def codec_for(where: torch.device) -> Codec:
    """Return the codec for tensors on a device.

    Raises:
        OptionError: there is none.
    """
    if where.type == "cpu":
        return CpuCodec()
    try:
        from headinfer.packed.fused import TritonCodec
    except ImportError:
        raise without_triton("packed", where) from None
    return TritonCodec()


def is_exact(codec: Codec, where: torch.device, dim: int) -> bool:
    """Whether a codec packs a few values to the bytes of the reference, and unpacks them.

    Args:
        codec: tried there.
        where: the device.
        dim: elements of a value.
    """
    generator = torch.Generator("cpu").manual_seed(0)
    values = torch.randn(*_CHECKED, dim, generator=generator, device="cpu").bfloat16()
    values[0, 0, 3, :5] *= 2.0**60  # which escape
    return gives(codec, where, values, reference.pack(values), values)


def gives(
    codec: Codec,
    where: torch.device,
    values: torch.Tensor,
    pages: torch.Tensor,
    unpacked: torch.Tensor,
) -> bool:
    """Whether a codec gives a reference's bytes on a device.

    Args:
        codec: tried there.
        where: the device.
        values: to be packed.
        pages: what the reference packs them to.
        unpacked: the values that the reference gives of its pages.
    """
    made, back = torch.zeros_like(pages, device=where), torch.zeros_like(values, device=where)
    codec.pack(values.to(where), made)
    codec.unpack(made, back)
    return torch.equal(made.cpu(), pages) and torch.equal(back.cpu(), unpacked)


def without_triton(form: str, where: torch.device) -> OptionError:
    """Return the error where a form needs Triton, and it cannot be imported."""
    return OptionError(
        f"kv_cache={form} needs Triton for {where}, and it cannot be imported; use "
        "kv_cache=dense (--kv-cache dense)"
    )
