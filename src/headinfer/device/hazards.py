"""Happens-before checking of memory accesses on several streams, by vector clocks.

Each stream counts its operations, and a clock maps stream names to counts. An operation is ordered
after another when its clock has reached the other's count on the other's stream. Two accesses to
overlapping bytes, at least one of them a write, must be ordered. The method is the one of
happens-before race detectors; what is tracked here is byte ranges of tensor storages.
"""

import bisect
from typing import NamedTuple

import torch

Clock = dict[str, int]


class HazardError(RuntimeError):
    """Two accesses to the same memory are not ordered; names both. A defect, never a user error."""


def join(clock: Clock, other: Clock) -> None:
    """Raise `clock`, in place, to the least clock after both."""
    for stream, count in other.items():
        clock[stream] = max(clock.get(stream, 0), count)


def abroad(clock: Clock, home: int, there: int) -> Clock:
    """Return a clock of one device as another one counts.

    A device calls its own streams by their names, and those of others by the device's number, too.

    Args:
        clock: of the one.
        home: its number.
        there: the number of the other.
    """
    suffix = f"@{there}"
    names = {name: name if "@" in name else f"{name}@{home}" for name in clock}
    return {names[name].removesuffix(suffix): count for name, count in clock.items()}


class Access(NamedTuple):
    """A read or write; `operation` is its number on its stream."""

    stream: str
    operation: int
    write: bool
    purpose: str

    def __str__(self) -> str:
        """Name the access as in "read on compute (attend ...)"."""
        return f"{'write' if self.write else 'read'} on {self.stream} ({self.purpose})"

    def precedes(self, clock: Clock) -> bool:
        """Whether the access is ordered before an operation with `clock`."""
        return clock.get(self.stream, 0) >= self.operation


def byte_range(tensor: torch.Tensor) -> tuple[int, int]:
    """Return the addresses of the first byte of a contiguous tensor and of the one after its last.

    Tensors with gaps must be given piece by piece, or neighbours would seem to overlap.
    """
    assert tensor.is_contiguous(), "a tracked access must be contiguous"
    start = tensor.data_ptr()
    return start, start + tensor.numel() * tensor.element_size()


_Stretch = tuple[int, tuple[Access, ...]]
"""The address of the first byte of some that were accessed alike, and the accesses that later ones
must still be ordered after. It ends where the next one of the storage begins."""


def _cut(stretches: list[_Stretch], address: int) -> int:
    """Have a stretch begin at an address, and return which one does."""
    index = bisect.bisect_left(stretches, (address,))
    if index == len(stretches) or stretches[index][0] != address:
        stretches.insert(index, (address, stretches[index - 1][1]))
    return index


class AccessLog:
    """A log of the accesses that later ones must still be ordered after."""

    def __init__(self) -> None:
        self._by_storage: dict[int, list[_Stretch]] = {}  # ascending

    def add(self, tensor: torch.Tensor, clock: Clock, stream: str, write: bool, what: str) -> None:
        """Check an access against all before it, and remember it.

        Args:
            tensor: the contiguous bytes accessed.
            clock: the clock of the operation, its own stream's count included.
            stream: the operation's stream.
            write: whether it writes.
            what: for the message.

        Raises:
            HazardError: an earlier overlapping access is not ordered before this one.
        """
        if tensor.numel() == 0:
            return
        start, end = byte_range(tensor)
        access = Access(stream, clock.get(stream, 0), write, what)
        storage = tensor.untyped_storage().data_ptr()
        stretches = self._by_storage.get(storage)
        if stretches is None:
            stretches = self._by_storage[storage] = [(0, ())]
        first, last = _cut(stretches, start), _cut(stretches, end)
        for _, accesses in stretches[first:last]:
            for past in accesses:
                if (write or past.write) and not past.precedes(clock):
                    raise HazardError(f"{access} is not ordered after the {past}")
        # Whatever must come after what is dropped here must come after this access too, either
        # because this is a write that came after it, or because it is the same stream's read.
        if write:
            stretches[first:last] = [(start, (access,))]
        else:
            stretches[first:last] = [
                (at, (*(past for past in accesses if past.write or past.stream != stream), access))
                for at, accesses in stretches[first:last]
            ]

    def release(self, storage_address: int, clock: Clock, next_use: str) -> None:
        """Drop the accesses of a storage that is freed, so that its address can be used again.

        Args:
            storage_address: of its first byte.
            clock: what comes before any use by the memory's next owner.
            next_use: names that use in the message.

        Raises:
            HazardError: an access is not ordered before the next owner's.
        """
        for _, accesses in self._by_storage.pop(storage_address, ()):
            for past in accesses:
                if not past.precedes(clock):
                    raise HazardError(f"{next_use} is not ordered after the {past}")
