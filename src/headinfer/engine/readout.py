"""Tokens of a layer in memory of somebody else: tensors for users.

That is rare, so it waits on the host for what it started, and needs no edge of its own. The engine
settles its streams before.
"""

from typing import Literal, TypeAlias

import torch

from headinfer.device.base import Device, Edge
from headinfer.engine.disk_tiles import in_memory
from headinfer.engine.packing import bring_part
from headinfer.kv.extent import Tile
from headinfer.kv.ledger import Ledger
from headinfer.plan.format import Format

Part: TypeAlias = Literal["keys", "values"]


def part_shape(ledger: Ledger, part: Part) -> tuple[int, int, int, int]:
    """Return the shape of a layer's keys or values."""
    geometry = ledger.geometry
    dim = geometry.key_dim if part == "keys" else geometry.value_dim
    return geometry.batch, geometry.kv_heads, ledger.visible_tokens, dim


def read(device: Device, ledger: Ledger, part: Part) -> torch.Tensor:
    """Return all of a layer's keys or values that a query sees, in new memory.

    Args:
        device: where the tensor is made.
        ledger: of the layer, at rest. Resident tokens are read on the host, which has them too.
        part: which of the two.

    Returns:
        `[batch, kv_heads, tokens, dim]` on the device, which the caller owns.
    """
    shape = part_shape(ledger, part)
    out = torch.empty(shape, dtype=ledger.geometry.dtype, device=device.torch_device)
    origin = ledger.tokens - ledger.visible_tokens
    for tile in _tiles(ledger, origin):
        source = tile.kv.keys if part == "keys" else tile.kv.values
        first = tile.start - origin
        place = out[:, :, first : first + tile.tokens]
        if tile.format is not Format.DENSE:
            bring_part(device, ledger, tile, part, place)
            continue
        if tile.piece.region is not None:
            kv = in_memory(tile).kv
            place.copy_(kv.keys if part == "keys" else kv.values)
            continue
        if device.tiles_are_views:
            place.copy_(source)
            continue
        if tile.piece.ready is not None:
            device.compute.wait(tile.piece.ready, Edge.TILE_FILLED)
        device.compute.copy(place, source)
    device.finish_compute()  # what was read may change as soon as this returns
    return out


def _tiles(ledger: Ledger, origin: int) -> list[Tile]:
    """Return the tokens from `origin` on, where they are most at rest."""
    tiles = list(ledger.host_tiles(origin, ledger.host_tokens))
    for extent in (ledger.tail, ledger.resident):
        start = max(ledger.host_tokens, origin)
        if extent is not None and extent.end > start:
            return [*tiles, extent.tile(start, extent.end)]
    return tiles
