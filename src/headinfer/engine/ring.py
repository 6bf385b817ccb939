"""The tiles of one captured step, through staging buffers that are filled anew as they come free.

It is `OverlappedTiles` for a pass whose tiles are all known. Its events are those of a capture:
nothing from before is waited for, and nothing is left on its way at the end. The buffers are full
when the step begins, with its first tiles. It ends with the same tiles in them, for the step that
follows. So the link works on while the model ends, or waits for the host.
"""

import collections
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from headinfer.device.base import Device, Edge, Event
from headinfer.engine.packing import Packing
from headinfer.engine.staging import copy_tile, staged
from headinfer.kv.extent import Piece, Tile
from headinfer.kv.ledger import Ledger


class Streamed(NamedTuple):
    """A tile of a step, and what it is a tile of.

    Attributes:
        ledger: of the layer.
        tile: of the host.
        capacity: tokens of a full tile.
    """

    ledger: Ledger
    tile: Tile
    capacity: int

    @property
    def num_bytes(self) -> int:
        """Bytes of the tile."""
        return sum(part.nbytes for part in self.tile.kv)


def fill(device: Device, buffers: Sequence[Piece], tiles: Sequence[Streamed]) -> int:
    """Fill the buffers with a step's first tiles, behind all that compute and copy-out do by now.

    Returns:
        The bytes of these tiles.
    """
    device.copy_in.wait(device.compute.record(), Edge.TILE_FREE)
    device.copy_in.wait(device.copy_out.record(), Edge.HOST_WRITTEN)
    for buffer, streamed in zip(buffers, tiles, strict=False):
        copy_tile(device, streamed.ledger.home, streamed.tile, buffer, streamed.capacity)
    return sum(streamed.num_bytes for streamed in tiles[: len(buffers)])


class TileRing:
    """A step's tiles, in the order in which they are attended.

    Args:
        device: where tiles are fetched to.
        buffers: memory for a tile each, with the first ones; see `fill`.
        tiles: of the host; all that will be asked for.
        packing: unpacks those that are packed; None where none is.
    """

    def __init__(
        self,
        device: Device,
        buffers: Sequence[Piece],
        tiles: Sequence[Streamed],
        packing: Packing | None = None,
    ) -> None:
        self._device, self._packing = device, packing
        again = dict(zip(buffers, tiles, strict=False)) if len(tiles) > len(buffers) else {}
        self._rest, self._again = iter(tiles[len(buffers) :]), again
        self._fetched: collections.deque[tuple[Streamed, Tile, Event | None]] = collections.deque(
            (streamed, staged(streamed.ledger.home, *streamed[1:], buffer), None)
            for buffer, streamed in zip(buffers, tiles, strict=False)
        )

    def _fetch(self, buffer: Piece) -> None:
        """Fill a buffer that compute has read with the tile that comes next.

        Behind the last one that is the buffer's first.
        """
        device, streamed = self._device, next(self._rest, None)
        following = self._again.get(buffer) if streamed is None else streamed
        if following is None:
            return
        device.copy_in.wait(device.compute.record(), Edge.TILE_FREE)
        home = following.ledger.home
        tile = copy_tile(device, home, following.tile, buffer, following.capacity)
        if streamed is not None:
            self._fetched.append((streamed, tile, device.copy_in.record()))

    def take(self, count: int) -> Iterator[Tile]:
        """Yield the next so many tiles, each valid on compute until the next is asked for."""
        compute = self._device.compute
        for _ in range(count):
            streamed, tile, filled = self._fetched.popleft()
            if filled is not None:
                compute.wait(filled, Edge.TILE_FILLED)
            compute.reads(tile.piece.memory, "attention to a tile")
            there = tile if self._packing is None else self._packing.dense(streamed.ledger, tile)
            if there is tile:
                yield tile
            self._fetch(tile.piece)
            if there is not tile:  # the buffer was done with before
                yield there

    def end(self) -> None:
        """Have compute wait for the first tiles, which are in the buffers again."""
        if self._again:
            self._device.compute.wait(self._device.copy_in.record(), Edge.STEP_DONE)
