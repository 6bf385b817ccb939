"""How fast a disk takes tokens and gives them back, as a cache above it moves them."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone

import torch

from headinfer.disk.file import DEPTH, PART_BYTES, SpillFile, aligned_empty
from headinfer.disk.mount import free_bytes, mount_of
from headinfer.disk.transfer import Transfer
from headinfer.errors import OptionError
from headinfer.plan.hardware import DiskRate
from headinfer.units import format_bytes

_STRETCHES = 8
"""Parts of the file that are timed by themselves: one that was disturbed then does not count."""

_STRETCH_BYTES, _QUICK_BYTES = 256 * 2**20, 32 * 2**20
"""2 GiB in all, which takes a few seconds; an eighth of it in a quick measurement."""

_FREE_SHARE = 2
"""As much of the free space as is left for others."""


@dataclass(frozen=True, slots=True)
class _Moving:
    """A way over a stretch of a file: some transfers are under way at once, in turn."""

    begin: Callable[[int, torch.Tensor], Transfer]
    buffers: Sequence[torch.Tensor]

    def per_s(self, start: int, num_bytes: int) -> float:
        """Return the bytes of a stretch that move in a second."""
        under_way: list[Transfer] = []
        began_s = time.perf_counter()
        try:
            for number, offset in enumerate(range(start, start + num_bytes, PART_BYTES)):
                if number >= len(self.buffers):
                    under_way[number - len(self.buffers)].wait()
                under_way.append(self.begin(offset, self.buffers[number % len(self.buffers)]))
            for transfer in under_way[-len(self.buffers) :]:
                transfer.wait()
        finally:
            for transfer in under_way:
                transfer.settle()
        return num_bytes / (time.perf_counter() - began_s)


def measure_disk(folder: str, *, quick: bool) -> DiskRate:
    """Measure the disk that a folder is on, with a file without a name, which goes behind.

    Reads and writes have the size and the depth of those of a cache. They leave out the page cache
    where the file system lets them. What is written are random bytes, in order.

    Args:
        folder: that may be written.
        quick: whether an eighth of the bytes is to do.

    Raises:
        OptionError: the folder cannot be used, or there is too little free space.
        DiskError: the disk fails.
    """
    file = SpillFile(folder)
    try:
        most = _QUICK_BYTES if quick else _STRETCH_BYTES
        free = free_bytes(folder)
        stretch = min(most, free // _FREE_SHARE // _STRETCHES) // PART_BYTES * PART_BYTES
        if not stretch:
            least = format_bytes(_FREE_SHARE * _STRETCHES * PART_BYTES)
            raise OptionError(
                f"disk {folder!r} has {format_bytes(free)} free, and measuring it takes {least}; "
                "free space, or name another folder"
            )
        buffers = [aligned_empty(PART_BYTES) for _ in range(DEPTH)]
        for buffer in buffers:
            buffer.random_(256)
        start = file.allocate(_STRETCHES * stretch)
        places = [start + number * stretch for number in range(_STRETCHES)]
        written = [_Moving(file.write, buffers).per_s(place, stretch) for place in places]
        read = [_Moving(file.read, buffers).per_s(place, stretch) for place in places]
    finally:
        file.close()
    return DiskRate(
        disk=mount_of(folder).disk,
        date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        direct=file.direct,
        read_bytes_per_s=statistics.median(read),
        best_read_bytes_per_s=max(read),
        write_bytes_per_s=statistics.median(written),
    )


def how(rate: DiskRate, folder: str) -> str:
    """Return for people how a disk was measured."""
    mount = mount_of(folder)
    if mount.in_memory:
        return mount.said
    cached = "past the page cache" if rate.direct else "through the page cache"
    return f"{mount.said}, {cached}, {DEPTH} x {format_bytes(PART_BYTES)}"
