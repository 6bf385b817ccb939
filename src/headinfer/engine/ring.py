"""The tiles of one captured step, through staging buffers that are filled anew as they come free.

It is `OverlappedTiles` for a pass whose tiles are all known, and whose events are those of a
capture: nothing from before is waited for, and nothing is left on its way at the end.
"""

import collections
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from headinfer.device.base import Device, Edge, Event
from headinfer.engine.staging import copy_tile
from headinfer.kv.extent import Piece, Tile
from headinfer.kv.pair import Geometry


class Streamed(NamedTuple):
    """A tile of a step, and what it is a tile of.

    Attributes:
        geometry: of the layer.
        tile: of the host.
        capacity: tokens of a full tile.
    """

    geometry: Geometry
    tile: Tile
    capacity: int


class TileRing:
    """A step's tiles, in the order in which they are attended.

    Args:
        device: where tiles are fetched to.
        buffers: memory for a tile each, with which compute is done.
        tiles: of the host; all that will be asked for.
    """

    def __init__(self, device: Device, buffers: Sequence[Piece], tiles: Sequence[Streamed]) -> None:
        self._device = device
        self._rest = iter(tiles)
        self._free: collections.deque[tuple[Piece, Event | None]] = collections.deque(
            (buffer, None) for buffer in buffers
        )
        self._fetched: collections.deque[tuple[Tile, Event]] = collections.deque()
        self._any = bool(tiles)

    def begin(self) -> None:
        """Have copy-in take part in the step, and fill all buffers.

        Its part ends with the last tile that is taken.
        """
        if self._any:
            device = self._device
            device.copy_in.wait(device.compute.record(), Edge.STEP_BEGUN)
            self._fetch_ahead()

    def _fetch_ahead(self) -> None:
        """Fill free buffers with the tiles that come next."""
        device = self._device
        while self._free:
            streamed = next(self._rest, None)
            if streamed is None:
                return
            buffer, free = self._free.popleft()
            if free is not None:
                device.copy_in.wait(free, Edge.TILE_FREE)
            tile = copy_tile(device, streamed.geometry, streamed.tile, buffer, streamed.capacity)
            self._fetched.append((tile, device.copy_in.record()))

    def take(self, count: int) -> Iterator[Tile]:
        """Yield the next so many tiles, each valid on compute until the next is asked for."""
        compute = self._device.compute
        for _ in range(count):
            tile, filled = self._fetched.popleft()
            compute.wait(filled, Edge.TILE_FILLED)
            compute.reads(tile.piece.memory, "attention to a tile")
            yield tile
            self._free.append((tile.piece, compute.record()))
            self._fetch_ahead()
