"""Happens-before checking of memory accesses on several streams, by vector clocks.

Each stream counts its operations, and a clock maps stream names to counts. An operation is ordered
after another when its clock has reached the other's count on the other's stream. Two accesses to
overlapping bytes, at least one of them a write, must be ordered. The method is the one of
happens-before race detectors; what is tracked here is byte ranges of tensor storages.
"""

from bisect import bisect_left
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


class _Newest:
    """A storage's bytes, each with the newest access to it of one kind.

    Those before must come before it, so that what comes after it comes after them.
    """

    __slots__ = ("_latest", "_stretches")

    def __init__(self) -> None:
        self._latest: Clock = {}
        # Addresses, ascending, and the access from each one to the next.
        self._stretches: list[tuple[int, Access | None]] = [(0, None)]

    def put(self, start: int, end: int, access: Access) -> None:
        """Note an access to the bytes between two addresses."""
        self._latest[access.stream] = access.operation
        stretches = self._stretches
        first, last = bisect_left(stretches, (start,)), bisect_left(stretches, (end,))
        changed: list[tuple[int, Access | None]] = [(start, access)]
        if last == len(stretches) or stretches[last][0] != end:
            changed.append((end, stretches[last - 1][1]))
        stretches[first:last] = changed

    def unordered(self, clock: Clock, start: int = 0, end: int | None = None) -> Access | None:
        """Return an access, to a byte between two addresses, that is not before a clock."""
        if all(clock.get(stream, 0) >= latest for stream, latest in self._latest.items()):
            return None
        stretches = self._stretches
        first = bisect_left(stretches, (start + 1,)) - 1
        last = None if end is None else bisect_left(stretches, (end,))
        for _, past in stretches[first:last]:
            if past is not None and not past.precedes(clock):
                return past
        return None


class AccessLog:
    """A log of the accesses that later ones must still be ordered after."""

    def __init__(self) -> None:
        # By storage and, for reads, by stream; None for all writes.
        self._by_storage: dict[int, dict[str | None, _Newest]] = {}

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
        logs = self._by_storage.setdefault(tensor.untyped_storage().data_ptr(), {})
        for kind, newest in logs.items():
            if write or kind is None:
                past = newest.unordered(clock, start, end)
                if past is not None:
                    raise HazardError(f"{access} is not ordered after the {past}")
        kind = None if write else stream
        if kind not in logs:
            logs[kind] = _Newest()
        logs[kind].put(start, end, access)

    def release(self, storage_address: int, clock: Clock, next_use: str) -> None:
        """Drop the accesses of a storage that is freed, so that its address can be used again.

        Args:
            storage_address: of its first byte.
            clock: what comes before any use by the memory's next owner.
            next_use: names that use in the message.

        Raises:
            HazardError: an access is not ordered before the next owner's.
        """
        for newest in self._by_storage.pop(storage_address, {}).values():
            past = newest.unordered(clock)
            if past is not None:
                raise HazardError(f"{next_use} is not ordered after the {past}")
