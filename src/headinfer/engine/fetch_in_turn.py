"""Streamed tiles that come one after the other: fetch, wait, attend; see `fetch`."""

from collections.abc import Iterator

from headinfer.device.base import Device, Edge
from headinfer.engine.disk_tiles import DiskTiles
from headinfer.engine.packing import Packing
from headinfer.engine.staging import Fetched, fetch
from headinfer.engine.stats import Stats
from headinfer.kv.extent import Piece, Tile
from headinfer.kv.ledger import Ledger
from headinfer.schedule.steps import Fetch


class SequentialTiles:
    """A source that fetches one tile, and waits, at a time: the oracle of the overlapped twin.

    Args:
        device: where tiles are fetched to.
        buffer: memory for a tile.
        stats: where bytes are counted.
        packing: unpacks tiles that are packed; None where none is.
        disk: reads tiles that are on the disk; None where none is.
    """

    lends = lent = False

    def __init__(
        self,
        device: Device,
        buffer: Piece,
        stats: Stats,
        packing: Packing | None = None,
        disk: DiskTiles | None = None,
    ) -> None:
        self.host_share = 0.0
        self.packing = packing
        self._disk = disk
        self.begun = False
        self._device = device
        self._buffer = buffer
        self._stats = stats

    def begin(self, ledger: Ledger, step: Fetch) -> None:
        """Turn to a layer; nothing is fetched before it is asked for."""
        self._step = step
        self._buffer.free = self._device.compute.record()  # also where attention to a tile failed

    def tiles(self, ledger: Ledger, heads: slice) -> Iterator[Tile]:
        """Yield tiles, waiting on the host for each to arrive and to be attended."""
        device, compute = self._device, self._device.compute
        step = self._step
        for stored in ledger.host_tiles(
            step.start, step.end, max_tokens=step.tile_tokens, groups=(heads,)
        ):
            fetched = self._fetch(ledger, stored, step.tile_tokens)
            fetched.filled.synchronize(Edge.TILE_FILLED)
            compute.wait(fetched.filled, Edge.TILE_FILLED)
            compute.reads(self._buffer.memory, "attention to a tile")
            yield fetched.tile if self.packing is None else self.packing.dense(ledger, fetched.tile)
            self._buffer.free = compute.record()
            device.synchronize()

    def _fetch(self, ledger: Ledger, stored: Tile, capacity: int) -> Fetched:
        """Enqueue the copy of a tile, once it was read where it is on the disk."""
        device, buffer, stats = self._device, self._buffer, self._stats
        if self._disk is None or stored.piece.region is None:
            return fetch(device, ledger, stored, buffer, capacity, stats)
        self._disk.drop()  # what failed before
        read = self._disk.begin(stored)
        assert read is not None, "no buffer is free"
        source = self._disk.end(read)
        fetched = fetch(device, ledger, stored, buffer, capacity, stats, source=source)
        self._disk.copied(read)
        return fetched

    def end(self) -> None:
        """Never called: nothing is left to do."""

    def drop(self) -> None:
        """Forget a tile whose read failed."""
        if self._disk is not None:
            self._disk.drop()

    def lend(self) -> tuple[Piece, ...]:
        """Return nothing: one tile at a time is what this is for."""
        return ()
