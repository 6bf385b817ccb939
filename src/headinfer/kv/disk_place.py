"""Host memory with a disk below: the newest blocks of a layer in memory, older ones in a file."""

from collections.abc import Callable

import torch

from headinfer.device.base import Device, Edge
from headinfer.disk.file import SpillFile
from headinfer.disk.reading import read_now
from headinfer.disk.region import Region
from headinfer.kv.extent import Extent, Piece, copy_rows
from headinfer.kv.pair import Geometry
from headinfer.kv.place import HostPlace


class DiskPlace(HostPlace):
    """A place in host memory, in blocks, that writes blocks to a file to take others.

    A block is written once, as it lies in memory. It is never changed on the disk: who cuts or
    rearranges it writes another one.

    Args:
        device: what the memory is for.
        file: what lies below.
        written: told of bytes that were written.

    Attributes:
        host_blocks: blocks of a layer that may lie in memory.
    """

    host_blocks = 0

    def __init__(self, device: Device, file: SpillFile, written: Callable[[int], None]) -> None:
        super().__init__(device)
        self._file = file
        self._written = written

    def take(self, geometry: Geometry, tokens: int, start: int) -> Extent:
        """Return an empty block of memory, or one of as many tokens as several have.

        Raises:
            MemoryPlanError: the host memory cannot be had.
        """
        capacity = max(-(-tokens // self.block_tokens), 1) * self.block_tokens
        return Extent(Piece(self._memory(geometry, capacity)), geometry, capacity, start)

    def lower(self, oldest: Extent, geometry: Geometry) -> Extent:
        """Write a block to the disk, and return what is there.

        Its memory may be written by copy-out after this, and freed by the host after `settle`.

        Raises:
            DiskError: the disk has no room for it, or failed; the block is as it was.
        """
        piece = oldest.piece
        if piece.ready is not None:
            piece.ready.synchronize(Edge.BLOCK_SENT)
        lower = self.write(oldest, geometry)
        for stream in (self._device.copy_in, self._device.host_work):
            self._device.copy_out.wait(stream.record(), Edge.BLOCK_READ)
        return lower

    def reuse(self, oldest: Extent, geometry: Geometry, start: int) -> Extent | None:
        """Return an empty block in the memory of a lowered one; None where it cannot serve."""
        piece, size = oldest.piece, geometry.num_bytes(self.block_tokens)
        if piece.holders > 1 or piece.memory.numel() != size:
            return None
        return Extent(Piece(piece.memory), geometry, self.block_tokens, start)

    def settle(self) -> None:
        """Wait for all that may still read memory of lowered blocks."""
        for stream in (self._device.copy_in, self._device.host_work):
            stream.record().synchronize(Edge.BLOCK_READ)

    def write(self, extent: Extent, geometry: Geometry) -> Extent:
        """Write a block that nothing in flight changes; return what is on the disk.

        Raises:
            DiskError: the disk has no room for it, or failed.
        """
        memory = extent.piece.memory
        self._device.host_access(memory, write=False, purpose="writing to the disk")
        region = Region(self._file, self._file.allocate(memory.numel()), memory.numel())
        # Where Ctrl-C comes before there is a transfer to wait for, the region is never used again.
        transfer = self._file.write(region.offset, memory)
        try:
            transfer.wait()
        except BaseException:
            transfer.settle()
            region.free()
            raise
        self._written(region.num_bytes)
        capacity = region.num_bytes // geometry.num_bytes(1)
        lower = Extent(Piece.on_disk(region), geometry, capacity, extent.start)
        lower.tokens = lower.capacity = extent.tokens
        return lower

    def give_back(self, extent: Extent) -> None:
        """Let go of an extent that no work in flight touches."""
        if extent.piece.region is None:
            super().give_back(extent)
            return
        extent.piece.holders -= 1
        if not extent.piece.holders:
            extent.piece.region.free()

    def select(self, source: Extent, old: Geometry, new: Geometry, rows: torch.Tensor) -> Extent:
        """Return an extent on the disk with rows of another one on the disk, which stays.

        Raises:
            DiskError: the disk has no room for it, or failed.
        """
        assert source.piece.region is not None
        capacity = source.piece.region.num_bytes // old.num_bytes(1)
        brought = Extent(Piece(read_now(source.piece.region)), old, capacity, source.start)
        brought.tokens = source.tokens
        target = Extent(Piece(self._memory(new, capacity)), new, capacity, source.start)
        target.tokens = source.tokens
        copy_rows(brought, target, rows)
        return self.write(target, new)

    def _memory(self, geometry: Geometry, tokens: int) -> torch.Tensor:
        """Return memory of the host for some tokens, at an address that files can be read to."""
        return aligned_host(self._device, geometry.num_bytes(tokens))


def aligned_host(device: Device, num_bytes: int) -> torch.Tensor:
    """Return memory as `Device.host_empty` does, at an address that files can be read to."""
    memory = device.host_empty(num_bytes)
    alignment = SpillFile.ALIGNMENT
    if memory.data_ptr() % alignment:  # locked memory never is
        memory = device.host_empty(num_bytes + alignment)
        start = -memory.data_ptr() % alignment
        memory = memory[start : start + num_bytes]
    return memory
