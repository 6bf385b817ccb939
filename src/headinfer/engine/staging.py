"""Copies of host tiles into staging buffers on the device."""

from typing import NamedTuple

from headinfer.device.base import Device, Edge, Event
from headinfer.engine.stats import Stats
from headinfer.kv.extent import Piece, Tile
from headinfer.kv.ledger import Ledger
from headinfer.kv.pair import ALL_HEADS, KV, Geometry
from headinfer.plan.memory import covering_tokens


class Fetched(NamedTuple):
    """A tile on its way to the device: where it will be, and when."""

    turn: int
    tile: Tile
    buffer: Piece
    filled: Event


def fetch(
    device: Device,
    ledger: Ledger,
    tile: Tile,
    buffer: Piece,
    capacity: int,
    stats: Stats,
    turn: int = 0,
    source: KV | None = None,
) -> Fetched:
    """Enqueue the copy of a host tile into a staging buffer, on copy-in.

    Heads lie as far apart in the buffer as in a full tile. So the strides are the same for every
    tile, which kernels that prepare for strides profit from.

    Args:
        device: where the buffer is.
        ledger: of the layer.
        tile: tokens in host memory.
        buffer: memory for a full tile.
        capacity: tokens of a full tile.
        stats: where bytes are counted.
        turn: noted with the result.
        source: where the tile was read to, if it is on the disk.

    Returns:
        The tile on the device, and the event on copy-in when it is there.
    """
    copy_in = device.copy_in
    if buffer.free is not None:
        copy_in.wait(buffer.free, Edge.TILE_FREE)
    if tile.piece.ready is not None:
        copy_in.wait(tile.piece.ready, Edge.HOST_WRITTEN)
    there = copy_tile(device, ledger.home, tile, buffer, capacity, source)
    heads = there.whole.keys.shape[1]
    stats.bytes_to_device += ledger.home.num_bytes(tile.moved_tokens, heads=heads)
    return Fetched(turn, there, buffer, copy_in.record())


def copy_tile(
    device: Device,
    geometry: Geometry,
    tile: Tile,
    buffer: Piece,
    capacity: int,
    source: KV | None = None,
) -> Tile:
    """Enqueue the copy of a host tile into a staging buffer on copy-in; see `fetch`.

    What is packed stays so.

    Args:
        device: where the buffer is.
        geometry: of the layer in host memory.
        tile: tokens there.
        buffer: memory for a full tile.
        capacity: tokens of a full tile.
        source: where the tile was read to, if it is on the disk.

    Returns:
        The tile on the device, once the copy is done.
    """
    source, there = source or tile.kv, staged(geometry, tile, capacity, buffer)
    place = there.kv
    device.copy_in.copy(place.keys, source.keys)
    device.copy_in.copy(place.values, source.values)
    return there


def staged(geometry: Geometry, tile: Tile, capacity: int, buffer: Piece) -> Tile:
    """Return where a host tile is once it was copied to a buffer."""
    heads, form = len(range(*tile.heads.indices(geometry.kv_heads))), tile.format
    whole = buffer.views(geometry, covering_tokens(form, capacity), heads)
    return tile._replace(
        piece=buffer, whole=whole, first=tile.first % form.row_tokens, heads=ALL_HEADS
    )
