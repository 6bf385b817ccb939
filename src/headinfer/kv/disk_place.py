"""Host memory with a disk below: the newest blocks of a layer in memory, older ones in a file."""

from collections.abc import Sequence
from typing import Protocol

import torch

from headinfer.device.base import Device, Edge
from headinfer.disk.file import SpillFile
from headinfer.disk.region import Region
from headinfer.kv.extent import Extent, Piece
from headinfer.kv.pair import Geometry
from headinfer.kv.place import HostPlace
from headinfer.plan.format import Format
from headinfer.plan.memory import block_bytes


class Counts(Protocol):
    """A count of what moves.

    Attributes:
        bytes_to_disk: that were written.
        bytes_from_disk: that were read.
    """

    bytes_to_disk: int
    bytes_from_disk: int


class DiskPlace(HostPlace):
    """A place in host memory, in blocks, that writes blocks to a file to take others.

    A block is written once, as it lies in memory: dense, or in packed pages, all of them full. It
    is never changed on the disk: who cuts or rearranges it writes another one.

    Packed pages that did not pack have addresses of raw copies. These copies stay in memory of the
    CPU, and the block on the disk keeps them. So a page read back from there is as good as before.

    Args:
        device: what the memory is for.
        file: what lies below.
        counts: where bytes are counted.

    Attributes:
        host_blocks: blocks of a layer that may lie in memory.
    """

    host_blocks = 0

    def __init__(self, device: Device, file: SpillFile, counts: Counts) -> None:
        super().__init__(device)
        self._file = file
        self._counts = counts

    def take(self, geometry: Geometry, tokens: int, start: int) -> Extent:
        """Return an empty block of memory, for all of its tokens or fewer.

        Raises:
            MemoryPlanError: the host memory cannot be had.
        """
        assert 0 < tokens <= self.block_tokens
        memory = aligned_host(self._device, self.block_bytes(geometry))
        block = Extent(Piece(memory), geometry, self.block_tokens, start)
        block.capacity = tokens
        return block

    def block_bytes(self, geometry: Geometry) -> int:
        """Return the bytes of a block of a layer, in whole alignments."""
        return block_bytes(geometry.num_bytes(self.block_tokens))

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
        piece = oldest.piece
        assert piece.memory.numel() == self.block_bytes(geometry)
        if piece.holders > 1:
            return None
        return Extent(Piece(piece.memory), geometry, self.block_tokens, start)

    def settle(self, block: Extent) -> None:
        """Wait for all that may still read a lowered block's memory; compute reads packed pages."""
        device = self._device
        compute = () if block.format is Format.DENSE else (device.compute,)
        for stream in (device.copy_in, device.host_work, *compute):
            stream.record().synchronize(Edge.BLOCK_READ)

    def write(self, extent: Extent, geometry: Geometry) -> Extent:
        """Write a full block that nothing in flight changes; return what is on the disk.

        Raises:
            DiskError: the disk has no room for it, or failed.
        """
        assert extent.tokens == extent.capacity, "a block goes to the disk that is not full"
        memory = extent.piece.memory
        self._device.host_access(memory, write=False, purpose="writing to the disk")
        region = Region(self._file, self._file.allocate(memory.numel()), memory.numel())
        # Where Ctrl-C comes before there is a transfer to wait for, the region is never used again.
        transfer = self._file.write(region.offset, memory)
        try:
            transfer.wait()
        except BaseException:
            region.free()
            raise
        self._counts.bytes_to_disk += region.num_bytes
        return self._on_disk(region, geometry, extent)

    def bring(self, lower: Extent, geometry: Geometry) -> Extent:
        """Return a block of memory with the tokens of one on the disk, which stays.

        Raises:
            DiskError: it cannot be read.
            MemoryPlanError: the host memory cannot be had.
        """
        region = lower.piece.region
        assert region is not None
        block = self.take(geometry, lower.capacity, lower.start)
        memory = block.piece.memory
        self._device.host_access(memory, write=True, purpose="reading a block back from the disk")
        region.file.read(region.offset, memory).wait()
        self._counts.bytes_from_disk += memory.numel()
        block.piece.refer_to(lower.piece.raw)
        block.tokens = lower.tokens
        return block

    def give_back(self, extent: Extent) -> None:
        """Let go of an extent that no work in flight touches."""
        if extent.piece.region is None:
            super().give_back(extent)
            return
        extent.piece.holders -= 1
        if not extent.piece.holders:
            extent.piece.region.free()

    def select(self, source: Extent, old: Geometry, new: Geometry, rows: Sequence[int]) -> Extent:
        """Return an extent on the disk with rows of another one on the disk, which stays.

        It takes the memory of both for a moment.

        Args:
            source: on the disk.
            old: its geometry.
            new: that of the rows.
            rows: row `i` is to be what row `rows[i]` is.

        Raises:
            DiskError: the disk has no room for it, or failed.
            MemoryPlanError: the host memory cannot be had.
        """
        block, target = self.bring(source, old), self.take(new, source.capacity, source.start)
        self.copy_rows(block, target, torch.tensor(rows, dtype=torch.long, device="cpu"))
        return self.write(target, new)

    def _on_disk(self, region: Region, geometry: Geometry, like: Extent) -> Extent:
        """Return an extent in a region, of the tokens that another one has."""
        piece = Piece.on_disk(region)
        piece.refer_to(like.piece.raw)
        lower = Extent(piece, geometry, self.block_tokens, like.start)
        lower.tokens = lower.capacity = like.tokens
        return lower


def aligned_host(device: Device, num_bytes: int) -> torch.Tensor:
    """Return memory as `Device.host_empty` does, at an address that files can be read to."""
    memory = device.host_empty(num_bytes)
    alignment = SpillFile.ALIGNMENT
    if memory.data_ptr() % alignment:  # locked memory never is
        memory = device.host_empty(num_bytes + alignment)
        start = -memory.data_ptr() % alignment
        memory = memory[start : start + num_bytes]
    return memory
