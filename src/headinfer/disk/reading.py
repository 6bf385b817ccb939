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


class _Slots(NamedTuple):
    """A spacing of heads in the memory that they are read to.

    Attributes:
        row: bytes from one row's first head to the next row's.
        head: bytes from one head to the next.
        num_bytes: from the first head's first byte to behind the last one's last.
    """

    row: int
    head: int
    num_bytes: int


def read_bytes(part: torch.Tensor) -> int:
    """Return the memory that a part takes once it was read.

    Args:
        part: tokens `[batch, heads, tokens, dim]` of a region, as a view without memory. A head's
            tokens are contiguous. Heads may begin anywhere: packed ones seldom do at alignments.
    """
    return _up(_slack(part) + _slots(part).num_bytes)


def strips(part: torch.Tensor, place: int) -> Iterator[Strip]:
    """Yield what to read for a part, as few and as large as there are.

    Args:
        part: see `read_bytes`.
        place: in the memory, where the part begins.
    """
    size, run, slots = part.element_size(), _run_bytes(part), _slots(part)
    file, memory = int(part.storage_offset()) * size, place + _slack(part)
    begun: tuple[int, int, int] | None = None  # where heads begin that follow on each other
    for row in range(part.shape[0]):
        for head in range(part.shape[1]):
            at = file + (row * part.stride(0) + head * part.stride(1)) * size
            to = memory + row * slots.row + head * slots.head
            if begun is not None and begun[0] + begun[2] == at and begun[1] + begun[2] == to:
                begun = (begun[0], begun[1], begun[2] + run)
                continue
            if begun is not None:
                yield _strip(*begun)
            begun = at, to, run
    if begun is not None:
        yield _strip(*begun)


def placed(part: torch.Tensor, memory: torch.Tensor, place: int) -> torch.Tensor:
    """Return a part as it lies in the memory that it was read to.

    Args:
        part: see `read_bytes`.
        memory: bytes, whose first is at an alignment.
        place: where the part begins in it.
    """
    size, slots = part.element_size(), _slots(part)
    whole = memory.view(part.dtype)
    strides = (slots.row // size, slots.head // size, part.shape[3], 1)
    offset = int(whole.storage_offset()) + (place + _slack(part)) // size
    return whole.as_strided(part.shape, strides, offset)


def _slots(part: torch.Tensor) -> _Slots:
    """Return where heads lie in memory: each at the same distance from an alignment as in the file.

    So each is read by whole alignments, which no two reads share.
    """
    size, run = part.element_size(), _run_bytes(part)
    head = _distance(part.stride(1) * size, run, adjacent=True)
    heads = (part.shape[1] - 1) * head + run
    row = _distance(part.stride(0) * size, heads, adjacent=head == run or part.shape[1] == 1)
    return _Slots(row, head, (part.shape[0] - 1) * row + heads)


def _distance(stride: int, num_bytes: int, *, adjacent: bool) -> int:
    """Return how far apart in memory to read what lies `stride` bytes apart in the file."""
    if adjacent and stride == num_bytes:
        return stride
    rest = stride % SpillFile.ALIGNMENT
    least = num_bytes + (2 if rest else 1) * SpillFile.ALIGNMENT
    return least + (rest - least) % SpillFile.ALIGNMENT


def _strip(file: int, memory: int, num_bytes: int) -> Strip:
    """Return the whole alignments that have some bytes."""
    slack = file % SpillFile.ALIGNMENT
    return Strip(file - slack, memory - slack, _up(slack + num_bytes))


def _run_bytes(part: torch.Tensor) -> int:
    """Bytes of one head's tokens."""
    return part.shape[2] * part.shape[3] * part.element_size()


def _slack(part: torch.Tensor) -> int:
    """Bytes between an alignment and the first token."""
    return int(part.storage_offset()) * part.element_size() % SpillFile.ALIGNMENT


def _up(num_bytes: int) -> int:
    return -(-num_bytes // SpillFile.ALIGNMENT) * SpillFile.ALIGNMENT
