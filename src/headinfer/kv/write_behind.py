"""Blocks on their way to the disk: written in the background, from memory of a fixed bound.

A block that leaves host memory keeps its memory until it has landed. The block that comes takes
other memory meanwhile: that of a block that has landed, or new memory within the bound.
"""

import collections
import contextlib
from typing import NamedTuple

import torch

from headinfer.device.base import Device, Edge, Event
from headinfer.disk.file import SpillFile
from headinfer.disk.region import Region
from headinfer.errors import DiskError, MemoryPlanError


class Leaving(NamedTuple):
    """A block that leaves host memory.

    Attributes:
        region: it goes to.
        memory: it lies in, as bytes.
        read: reached when streams have read what they were to read there.
    """

    region: Region
    memory: torch.Tensor
    read: tuple[Event, ...]


class WriteBehind:
    """A queue of blocks that are being written, and the memory of those that have landed.

    Args:
        device: what the memory is for.

    Attributes:
        limit_bytes: of memory for all that; 0 where each write is waited for.
        leaving: the blocks that have not landed, as far as anybody looked.
    """

    limit_bytes = 0

    def __init__(self, device: Device) -> None:
        self._device = device
        self.leaving: collections.deque[Leaving] = collections.deque()
        self._landed: collections.deque[Leaving] = collections.deque()

    def begin(self, block: Leaving) -> None:
        """Begin to write a block, which nothing changes any more."""
        self.leaving.append(block)
        block.region.begin()

    def memory(self, num_bytes: int) -> torch.Tensor:
        """Return memory for a block that comes, which copy-out may write to.

        It waits for the oldest write where there may be no more memory.

        Args:
            num_bytes: of the block, at most `limit_bytes`.

        Raises:
            DiskError: there is no memory, and a write failed.
            MemoryPlanError: the host memory cannot be had.
        """
        while True:
            self._collect()
            for position, block in enumerate(self._landed):
                if block.memory.numel() == num_bytes:
                    del self._landed[position]
                    for event in block.read:
                        self._device.copy_out.wait(event, Edge.BLOCK_READ)
                    return block.memory
            if self.num_bytes + num_bytes <= self.limit_bytes:
                try:
                    return aligned_host(self._device, num_bytes)
                except MemoryPlanError:
                    if not self.leaving:
                        raise  # else that of the oldest will do
            if self._landed:  # of another size
                self._free(self._landed.popleft())
            else:
                self.leaving[0].region.settle()
                self.go_on()

    @property
    def num_bytes(self) -> int:
        """Bytes of all its memory."""
        return sum(block.memory.numel() for block in (*self.leaving, *self._landed))

    @property
    def failed(self) -> bool:
        """Whether a write failed, and nobody was told."""
        return any(block.region.untold for block in self.leaving)

    def check(self) -> None:
        """Raise what writes failed with since the last check: one error for all of them.

        Raises:
            DiskError: the disk has no room, or failed. The blocks are kept in memory.
        """
        self._collect()
        if not self.failed:
            return
        self.settle()  # or the next one would be told soon after
        untold = [block.region for block in self.leaving if block.region.untold]
        for region in untold[1:]:
            with contextlib.suppress(DiskError):
                region.wait()
        untold[0].wait()

    def go_on(self) -> None:
        """Write anew what failed and somebody was told of, and wait for that.

        Raises:
            DiskError: it fails again, or failed and nobody was told.
        """
        self.check()
        again = [block.region for block in self.leaving if block.region.failed]
        for region in again:
            region.begin()
        for region in again:
            region.settle()
        self.check()
        while self._landed and self.num_bytes > self.limit_bytes:  # which was lowered meanwhile
            self._free(self._landed.popleft())

    def settle(self) -> None:
        """Block until all writes have ended, well or not."""
        for block in self.leaving:
            block.region.settle()
        self._collect()

    def free(self) -> None:
        """Free the memory of what has landed, with no work in flight."""
        self._collect()
        while self._landed:
            self._free(self._landed.popleft())

    def forget(self) -> None:
        """Free all memory once all writes have ended, with no work in flight.

        A block that others still read, and whose write failed, keeps its memory.
        """
        self.settle()
        self._landed.extend(self.leaving)
        self.leaving.clear()
        self.free()

    def _collect(self) -> None:
        """Take the memory of blocks that have landed; that of lost ones is theirs for good."""
        while self.leaving and (self.leaving[0].region.lost or self.leaving[0].region.landed):
            block = self.leaving.popleft()
            if not block.region.lost:
                self._device.host_access(block.memory, write=False, purpose="having written it")
                self._landed.append(block)

    def _free(self, block: Leaving) -> None:
        for event in block.read:
            event.synchronize(Edge.BLOCK_READ)
        self._device.host_access(block.memory, write=True, purpose="freeing a block on the disk")


def aligned_host(device: Device, num_bytes: int) -> torch.Tensor:
    """Return memory as `Device.host_empty` does, at an address that files can be read to."""
    memory = device.host_empty(num_bytes)
    alignment = SpillFile.ALIGNMENT
    if memory.data_ptr() % alignment:  # locked memory never is
        memory = device.host_empty(num_bytes + alignment)
        start = -memory.data_ptr() % alignment
        memory = memory[start : start + num_bytes]
    return memory
