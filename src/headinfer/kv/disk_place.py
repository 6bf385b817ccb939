"""Host memory with a disk below: the newest blocks of a layer in memory, older ones in a file."""

from collections.abc import Sequence
from typing import Protocol

import torch

from headinfer.device.base import Device, Edge, Stream
from headinfer.disk.file import SpillFile
from headinfer.disk.region import Region
from headinfer.kv.extent import Extent, Piece
from headinfer.kv.pair import Geometry
from headinfer.kv.place import HostPlace
from headinfer.kv.write_behind import Leaving, WriteBehind, aligned_host
from headinfer.plan.format import Format
from headinfer.plan.memory import block_bytes


class Counts(Protocol):
    """A count of what moves.

    Attributes:
        bytes_to_disk: that were written, or are being written.
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

    Blocks that make room for others are written in the background (`behind`). All other writes are
    waited for.

    Args:
        device: what the memory is for.
        file: what lies below.
        counts: where bytes are counted.

    Attributes:
        host_blocks: blocks of a layer that may lie in memory, beside those being written.
        behind: the blocks that are being written.
    """

    host_blocks = 0

    def __init__(self, device: Device, file: SpillFile, counts: Counts) -> None:
        super().__init__(device)
        self._file = file
        self._counts = counts
        self.behind = WriteBehind(device)
        self.under_way = self.behind.leaving

    def choose_sizes(self, block_tokens: int, host_blocks: int, staging_bytes: int) -> None:
        """Have blocks, and memory for those being written, be of such sizes from now on.

        Args:
            block_tokens: of a block; as many as ever.
            host_blocks: of a layer that may lie in memory.
            staging_bytes: of memory for those being written.
        """
        assert self.block_tokens in (0, block_tokens), "blocks stay as large as ever"
        self.block_tokens, self.host_blocks = block_tokens, host_blocks
        self.behind.limit_bytes = staging_bytes

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

    def leaves_behind(self, oldest: Extent, geometry: Geometry) -> bool:
        """Whether a block can leave in the background: no other ledger reads or changes it."""
        return oldest.piece.holders == 1 and self.block_bytes(geometry) <= self.behind.limit_bytes

    def take_beside(self, geometry: Geometry, start: int) -> Extent:
        """Return an empty block of memory beside those that are being written.

        Raises:
            DiskError: one of these failed.
            MemoryPlanError: the host memory cannot be had.
        """
        memory = self.behind.memory(self.block_bytes(geometry))
        return Extent(Piece(memory), geometry, self.block_tokens, start)

    def on_its_way(self, oldest: Extent, geometry: Geometry) -> tuple[Extent, Leaving]:
        """Return what will be on the disk of a block, and how it leaves, with nothing begun yet."""
        self._settle_sent(oldest)
        region = self._region(oldest)
        read = tuple(stream.record() for stream in self._readers(oldest))
        return self._on_disk(region, geometry, oldest), Leaving(region, oldest.piece.memory, read)

    def leave(self, block: Leaving) -> None:
        """Begin to write a block that nobody else has any more."""
        self._counts.bytes_to_disk += block.region.num_bytes
        self.behind.begin(block)

    def lower(self, oldest: Extent, geometry: Geometry) -> Extent:
        """Write a block to the disk, and return what is there.

        Its memory may be written by copy-out after this, and freed by the host after `settle`.

        Raises:
            DiskError: the disk has no room for it, or failed; the block is as it was.
        """
        self._settle_sent(oldest)
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
        """Wait for all that may still read a lowered block's memory."""
        for stream in self._readers(block):
            stream.record().synchronize(Edge.BLOCK_READ)

    def _settle_sent(self, block: Extent) -> None:
        """Wait until all of a block's tokens are in its memory."""
        if block.piece.ready is not None:
            block.piece.ready.synchronize(Edge.BLOCK_SENT)

    def _readers(self, block: Extent) -> tuple[Stream, ...]:
        """Return the streams that may read a block; compute reads packed pages."""
        device = self._device
        compute = () if block.format is Format.DENSE else (device.compute,)
        return (device.copy_in, device.host_work, *compute)

    def write(self, extent: Extent, geometry: Geometry) -> Extent:
        """Write a full block that nothing in flight changes; return what is on the disk.

        Raises:
            DiskError: the disk has no room for it, or failed.
        """
        region = self._region(extent)
        try:
            region.begin()
            region.wait()
        except BaseException:
            region.free()
            raise
        self._counts.bytes_to_disk += region.num_bytes
        return self._on_disk(region, geometry, extent)

    def _region(self, extent: Extent) -> Region:
        """Return a region for a full block, which lies in memory alone until it is written."""
        assert extent.tokens == extent.capacity, "a block goes to the disk that is not full"
        memory = extent.piece.memory
        self._device.host_access(memory, write=False, purpose="writing to the disk")
        return Region(self._file, memory)

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
        for transfer in region.read(0, memory):
            transfer.wait()
        self._counts.bytes_from_disk += memory.numel()
        block.piece.refer_to(lower.piece.raw)
        block.tokens = lower.tokens
        return block

    @property
    def beside_bytes(self) -> int:
        """Bytes of memory of blocks that are being written, or have landed."""
        return self.behind.num_bytes

    def settled(self) -> bool:
        """Wait for the writes in the background; return whether nobody is to be told of any."""
        self.behind.settle()
        return not self.behind.failed

    def check(self) -> None:
        """Raise what a write in the background failed with since the last check.

        Raises:
            DiskError: it failed. What was to be written is still in memory.
        """
        self.behind.check()

    def go_on(self) -> None:
        """Write anew what failed before a pass that would go on.

        Raises:
            DiskError: it fails again, or failed and nobody was told.
        """
        self.behind.go_on()

    def free(self) -> None:
        """Free the memory of blocks that are on the disk by now, with no work in flight."""
        self.behind.free()

    def forget(self) -> None:
        """Discard what is being written for nobody, and free its memory, with no work in flight."""
        self.behind.forget()

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
