"""Tokens that the host holds on the disk: read ahead of their copies to the device, or at once.

The order of tiles is known, so several reads are under way while others are copied. The thread that
enqueues a copy waits for its read before. A buffer is read to again once the copy from it is done.
"""

import collections
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from headinfer.device.base import Device, Edge
from headinfer.disk.file import aligned_empty
from headinfer.disk.reading import placed, read_bytes, strips
from headinfer.disk.transfer import Transfer
from headinfer.engine.stats import Stats
from headinfer.kv.extent import Piece, Tile
from headinfer.kv.ledger import Ledger
from headinfer.kv.pair import ALL_HEADS, KV
from headinfer.kv.write_behind import aligned_host
from headinfer.plan.disk_blocks import READS


class Next(NamedTuple):
    """A tile to be fetched next.

    Attributes:
        turn: it belongs to.
        ledger: of its layer.
        tile: in host memory, or on the disk.
    """

    turn: int
    ledger: Ledger
    tile: Tile


class Read(NamedTuple):
    """A tile that is read from the disk.

    Attributes:
        kv: it lies there, once all transfers are done.
        buffer: the memory of that.
        transfers: that are under way.
    """

    kv: KV
    buffer: Piece
    transfers: list[Transfer]


class DiskTiles:
    """A reader of tiles on the disk into locked memory, several at a time.

    Args:
        device: copies them from there, on copy-in.
        buffers: memory of the host for a tile each.
        stats: where bytes are counted.
        tile_heads: of a tile, at most.
        tile_tokens: of a tile, at most.
    """

    def __init__(
        self,
        device: Device,
        buffers: Sequence[Piece],
        stats: Stats,
        *,
        tile_heads: int,
        tile_tokens: int,
    ) -> None:
        self._device = device
        self._tile_heads, self._tile_tokens = tile_heads, tile_tokens
        self._buffers = list(buffers)
        self._stats = stats
        self._free = collections.deque(self._buffers)
        self._reads: list[Read] = []
        self._beginning: Piece | None = None  # to be read to, as far as anybody knows

    def begin(self, tile: Tile, *, wait: bool = True) -> Read | None:
        """Begin to read a tile.

        Args:
            tile: on the disk.
            wait: whether to wait for a buffer; else the answer is None where none is free.
        """
        if not self._free:
            return None
        buffer = self._free[0]
        if buffer.free is not None:
            if not (wait or buffer.free.reached):
                return None
            buffer.free.synchronize(Edge.READ_COPIED)
            buffer.free = None
        self._beginning = self._free.popleft()
        self._device.host_access(buffer.memory, write=True, purpose="reading from the disk")
        read = Read(_placed(tile, buffer.memory), buffer, [])
        self._reads.append(read)
        _begin(tile, buffer.memory, read.transfers)
        self._beginning = None
        return read

    def end(self, read: Read) -> KV:
        """Wait for a tile, and return it; its buffer stays until `copied`.

        Raises:
            DiskError: it cannot be read.
        """
        for transfer in read.transfers:
            transfer.wait()
        self._stats.bytes_from_disk += sum(part.nbytes for part in read.kv)
        return read.kv

    def copied(self, read: Read) -> None:
        """Have a buffer free once all that copy-in was given is done."""
        read.buffer.free = self._device.copy_in.record()
        self._reads.remove(read)
        self._free.append(read.buffer)

    def copy_all(self, tile: Tile, place: KV) -> None:
        """Copy any tokens on the disk to the device, on copy-in, by tiles that buffers hold.

        Args:
            tile: on the disk, of all heads.
            place: on the device, for as many tokens.

        Raises:
            DiskError: they cannot be read.
        """
        heads, tokens = place.keys.shape[1], self._tile_tokens
        self.drop()
        for head in range(0, heads, self._tile_heads):
            group = slice(head, min(head + self._tile_heads, heads))
            for first in range(0, tile.tokens, tokens):
                end = min(first + tokens, tile.tokens)
                cut = tile._replace(first=tile.first + first, tokens=end - first, heads=group)
                read = self.begin(cut)
                assert read is not None, "no buffer is free"
                source = self.end(read)
                for to, part in zip(place, source, strict=True):
                    self._device.copy_in.copy(to[:, group, first:end], part)
                self.copied(read)

    def drop(self) -> None:
        """Wait for what is under way, and forget it; also where a copy of it failed."""
        for read in self._reads:
            for transfer in read.transfers:
                transfer.settle()
            read.buffer.free = self._device.copy_in.record()
        self._reads.clear()
        lost = self._beginning
        if lost is not None:  # Ctrl-C came while it began: a transfer nobody knows may write there
            memory = aligned_host(self._device, lost.memory.numel())
            self._buffers = [Piece(memory) if each is lost else each for each in self._buffers]
            self._beginning = None
        self._free = collections.deque(self._buffers)


class ReadAhead:
    """A queue of the tiles to be fetched next, those on the disk already being read.

    Args:
        disk: reads them; None where none lies below.
    """

    def __init__(self, disk: DiskTiles | None) -> None:
        self._disk = disk
        self._queue: collections.deque[tuple[Next, Read | None]] = collections.deque()
        self._waiting: Next | None = None  # for a buffer to be read to

    def take(self, more: Callable[[], Next | None]) -> tuple[Next, Read | None] | None:
        """Return the next tile, and begin to read more; None where there is none.

        Args:
            more: gives the tiles behind those that are queued.
        """
        depth = 1 if self._disk is None else READS
        while len(self._queue) < depth:
            following = self._waiting or more()
            self._waiting = following
            if following is None:
                break
            read = None
            if self._disk is not None and following.tile.piece.region is not None:
                read = self._disk.begin(following.tile, wait=not self._queue)
                if read is None:
                    break
            self._queue.append((following, read))
            self._waiting = None
        return self._queue.popleft() if self._queue else None

    def drop(self) -> None:
        """Forget all of it."""
        self._queue.clear()
        self._waiting = None
        if self._disk is not None:
            self._disk.drop()


def in_memory(tile: Tile) -> Tile:
    """Return a tile whose tokens are in memory of the CPU: itself, or what was read of the disk.

    Raises:
        DiskError: it cannot be read.
    """
    if tile.piece.region is None:
        return tile
    memory = aligned_empty(sum(map(read_bytes, tile.kv)))
    transfers: list[Transfer] = []
    try:
        _begin(tile, memory, transfers)
    finally:  # the memory goes with an error
        for transfer in transfers:
            transfer.settle()
    for transfer in transfers:
        transfer.wait()
    piece = Piece(memory)
    piece.refer_to(tile.piece.raw)
    first = tile.first % tile.format.row_tokens
    return tile._replace(piece=piece, whole=_placed(tile, memory), first=first, heads=ALL_HEADS)


def _begin(tile: Tile, memory: torch.Tensor, transfers: list[Transfer]) -> None:
    """Begin to read a tile to memory; note each transfer as it begins."""
    region, place = tile.piece.region, 0
    assert region is not None
    for part in tile.kv:
        for strip in strips(part, place):
            into = memory[strip.place : strip.place + strip.num_bytes]
            transfers.extend(region.read(strip.offset, into))
        place += read_bytes(part)


def _placed(tile: Tile, memory: torch.Tensor) -> KV:
    keys, values = tile.kv
    with torch.inference_mode(False):
        return KV(placed(keys, memory, 0), placed(values, memory, read_bytes(keys)))
