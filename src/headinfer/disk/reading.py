"""Which bytes of the file hold some tokens, and where they are once they were read."""

from collections.abc import Iterator
from typing import NamedTuple

import torch

from headinfer.disk.file import SpillFile


class Strip(NamedTuple):
    """A stretch of the file, in whole alignments.

    Attributes:
        offset: in the region.
        place: of its first byte in the memory that it is read to.
        num_bytes: how many there are.
    """

    offset: int
    place: int
    num_bytes: int


def slot_bytes(part: torch.Tensor) -> int:
    """Return the memory that one head of a part takes once it was read.

    Args:
        part: tokens `[batch, heads, tokens, dim]` of a region, as a view without memory. Heads
            begin at alignments.
    """
    row_bytes = part.shape[3] * part.element_size()
    return _up(_slack(part) + part.shape[2] * row_bytes)


def read_bytes(part: torch.Tensor) -> int:
    """Return the memory that all heads of a part take once they were read."""
    return part.shape[0] * part.shape[1] * slot_bytes(part)


def strips(part: torch.Tensor, place: int) -> Iterator[Strip]:
    """Yield what to read for a part, as few and as large as there are.

    Args:
        part: see `slot_bytes`.
        place: in the memory, where the part begins.
    """
    size, slot = part.element_size(), slot_bytes(part)
    first = int(part.storage_offset()) * size - _slack(part)
    before: Strip | None = None
    for row in range(part.shape[0]):
        for head in range(part.shape[1]):
            at = first + (row * part.stride(0) + head * part.stride(1)) * size
            if before is not None and before.offset + before.num_bytes == at:
                before = before._replace(num_bytes=before.num_bytes + slot)
            else:
                if before is not None:
                    yield before
                before = Strip(at, place, slot)
            place += slot
    if before is not None:
        yield before


def placed(part: torch.Tensor, memory: torch.Tensor, place: int) -> torch.Tensor:
    """Return a part as it lies in the memory that it was read to.

    Args:
        part: see `slot_bytes`.
        memory: bytes, whose first is at an alignment.
        place: where the part begins in it.
    """
    size, slot = part.element_size(), slot_bytes(part)
    whole = memory.view(part.dtype)
    strides = (part.shape[1] * slot // size, slot // size, part.shape[3], 1)
    offset = int(whole.storage_offset()) + (place + _slack(part)) // size
    return whole.as_strided(part.shape, strides, offset)


def _slack(part: torch.Tensor) -> int:
    """Bytes between an alignment and a head's first token."""
    return int(part.storage_offset()) * part.element_size() % SpillFile.ALIGNMENT


def _up(num_bytes: int) -> int:
    return -(-num_bytes // SpillFile.ALIGNMENT) * SpillFile.ALIGNMENT
