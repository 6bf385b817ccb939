"""Regions of host memory, of which some are kept for the next cache when one is gone."""

import mmap
import threading
import weakref
from collections.abc import Callable

import torch

from headinfer.errors import MemoryPlanError

_MOST_SPARE_SHARE = 5 / 4
"""A region serves who asks for a little less. What nobody asked for is no tokens' memory."""


class Region:
    """A mapped region of host memory.

    Args:
        memory: mapped; unmapped with the region.
        undo: called before that, but not as the process ends.

    Attributes:
        num_bytes: its size, at least 1.
    """

    def __init__(self, memory: mmap.mmap, undo: Callable[[], object] | None = None) -> None:
        self._memory = memory
        self.num_bytes = len(memory)
        if undo is not None:
            finalizer = weakref.finalize(self, _undo, memory, undo)
            finalizer.atexit = False  # the driver frees it, and may be gone by then

    def tensor(self, num_bytes: int) -> torch.Tensor:
        """Return its first `num_bytes` as uint8, in a storage of their own."""
        with torch.inference_mode(False):  # or it could not be written to outside
            return torch.frombuffer(self._memory, dtype=torch.uint8)[:num_bytes]


def _undo(_memory: mmap.mmap, undo: Callable[[], object]) -> None:
    undo()


class SpareRegions:
    """A source of regions that keeps some of those that are given back.

    To lock memory takes longer than to pass a short prompt, and it holds the caller up.

    Measured beside an H100, with 128 MiB of KV: the first layer waited 14 ms for locked memory, and
    unlocking it took 6.

    Args:
        make: returns a new region of so many bytes, or raises `MemoryPlanError`.
        free_bytes: returns the host memory that is left beside what is kept.
    """

    def __init__(
        self, make: Callable[[int], Region], free_bytes: Callable[[], int] = lambda: 2**62
    ) -> None:
        self._make, self._free_bytes = make, free_bytes
        # One thread may come back to it: what the garbage collector frees is given back at once.
        self._turn = threading.RLock()
        self._spare: list[Region] = []  # the oldest first
        self._most_spare_bytes, self._most_bytes = 0, 2**62
        self._used_bytes = 0

    @property
    def spare_bytes(self) -> int:
        """Bytes that are kept and not used."""
        return sum([region.num_bytes for region in self._spare])

    def keep(self, spare_bytes: int, most_bytes: int | None = None) -> None:
        """Keep regions from now on.

        Args:
            spare_bytes: the most to be kept.
            most_bytes: of kept and used regions together; None for no limit.
        """
        self._most_spare_bytes = spare_bytes
        self._most_bytes = 2**62 if most_bytes is None else most_bytes
        self._shrink(0)

    def take(self, num_bytes: int) -> torch.Tensor:
        """Return memory `[num_bytes]` of uint8, not 0, that nobody else has.

        It is given back with the last tensor on it, when no work may touch it any more.

        Raises:
            MemoryPlanError: it cannot be had, not even without what is kept.
        """
        ready = self.take_spare(num_bytes)
        if ready is not None:
            return ready
        if self._spare:
            scarce = self._free_bytes() < num_bytes + self._most_spare_bytes
            self._shrink(num_bytes, drop_all=scarce)
        try:
            region = self._make(num_bytes)
        except MemoryPlanError:
            if not self._spare:
                raise
            self._shrink(num_bytes, drop_all=True)
            region = self._make(num_bytes)
        return self._handed_out(region, num_bytes)

    def take_spare(self, num_bytes: int) -> torch.Tensor | None:
        """Return memory that is kept; None where there is none of that size. See `take`."""
        with self._turn:
            most_bytes = max(int(num_bytes * _MOST_SPARE_SHARE), 1)
            fitting = [each for each in self._spare if num_bytes <= each.num_bytes <= most_bytes]
            if not fitting:
                return None
            region = min(fitting, key=lambda each: each.num_bytes)
            if region not in self._spare:  # the collector came in between
                return None
            self._spare.remove(region)
        return self._handed_out(region, num_bytes)

    def _handed_out(self, region: Region, num_bytes: int) -> torch.Tensor:
        tensor = region.tensor(num_bytes)
        with self._turn:
            self._used_bytes += region.num_bytes
        finalizer = weakref.finalize(tensor.untyped_storage(), self._give_back, region)
        finalizer.atexit = False
        return tensor

    def _give_back(self, region: Region) -> None:
        with self._turn:
            self._used_bytes -= region.num_bytes
            self._spare.append(region)
        self._shrink(0)

    def _shrink(self, more_bytes: int, *, drop_all: bool = False) -> None:
        """Drop the oldest regions until the rest and `more_bytes` are within the limits."""
        dropped = []
        with self._turn:
            room = self._most_bytes - self._used_bytes - more_bytes
            most_bytes = 0 if drop_all else min(self._most_spare_bytes, room)
            spare_bytes = self.spare_bytes
            while self._spare and spare_bytes > most_bytes:
                dropped.append(self._spare.pop(0))
                spare_bytes -= dropped[-1].num_bytes
        dropped.clear()  # out of turn, as it takes its time
