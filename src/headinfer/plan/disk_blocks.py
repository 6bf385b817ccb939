"""How host memory above a disk is cut into blocks. Pure arithmetic."""

import math
from dataclasses import replace

from headinfer.errors import MemoryPlanError
from headinfer.plan.plan import Plan
from headinfer.units import format_bytes

ALIGNMENT_BYTES = 4096
"""What reads and writes past the page cache begin at, and are multiples of."""

READS = 8
"""Tiles that are on their way from the disk, or waiting for the link."""

_MOST_BLOCK_TOKENS = 4096
"""Tokens of a block at most. At 128 KiB of KV a token the blocks of all layers are 512 MiB."""

LEAST_BLOCKS = 2
"""Blocks of a layer in memory: one is filled, and the one before may still be on its way."""

_GOOD_BLOCKS = 8
"""With so many a layer's memory is well used, as the newest one is half empty on average."""


def with_disk(plan: Plan, room_bytes: int, block_tokens: int = 0) -> Plan:
    """Return a plan whose tokens lie in blocks, as many of them in host memory as there is room.

    A block has whole tiles where that can be, so that attention has the same tiles as without a
    disk. Each head of a block begins at an alignment, so that a tile is read in few large reads.

    Args:
        plan: without a disk.
        room_bytes: host memory that the cache may take.
        block_tokens: of the blocks that it has already, which stay as large; 0 where it has none.

    Raises:
        MemoryPlanError: that is too little.
    """
    if not plan.shape.kinds_of_full_layers:
        return plan
    block_tokens = block_tokens or _block_tokens(plan, room_bytes)
    blocks = _blocks(plan, block_tokens, room_bytes)
    if blocks < LEAST_BLOCKS:
        least = _buffers_bytes(plan, block_tokens)
        least += plan.shape.host_kv_bytes(LEAST_BLOCKS * block_tokens, plan.batch)
        raise MemoryPlanError(
            f"a KV cache with a disk below needs {format_bytes(least)} of CPU memory at least, and "
            f"{format_bytes(max(room_bytes, 0))} can be had; give more host_memory or smaller tiles"
        )
    return replace(
        plan,
        disk_block_tokens=block_tokens,
        disk_host_blocks=blocks,
        disk_buffers_bytes=_buffers_bytes(plan, block_tokens),
    )


def _block_tokens(plan: Plan, room_bytes: int) -> int:
    """Return the tokens of a block, where nothing is kept in other ones."""
    layers, itemsize = plan.shape.kinds_of_full_layers, plan.shape.kv_itemsize
    rows = [dim * itemsize for layer in layers for dim in (layer.key_dim, layer.value_dim)]
    unit = math.lcm(*(ALIGNMENT_BYTES // math.gcd(ALIGNMENT_BYTES, row) for row in rows))
    tiled = math.lcm(unit, plan.tile_tokens)
    unit = tiled if tiled <= _MOST_BLOCK_TOKENS else unit
    block_tokens, most = unit, max(_MOST_BLOCK_TOKENS, unit)
    while 2 * block_tokens <= most and _blocks(plan, 2 * block_tokens, room_bytes) >= _GOOD_BLOCKS:
        block_tokens *= 2
    return block_tokens


def _blocks(plan: Plan, block_tokens: int, room_bytes: int) -> int:
    """Return the blocks of each layer that there is room for beside the buffers."""
    left = room_bytes - _buffers_bytes(plan, block_tokens)
    return max(left // plan.shape.host_kv_bytes(block_tokens, plan.batch), 0)


def _buffers_bytes(plan: Plan, block_tokens: int) -> int:
    """Return the bytes of all buffers: a tile each, whose heads begin where the disk's do."""
    itemsize, tokens = plan.shape.kv_itemsize, min(plan.tile_tokens, block_tokens)

    def slot_bytes(dim: int) -> int:  # an alignment more, where a tile begins behind one
        return (-(-tokens * dim * itemsize // ALIGNMENT_BYTES) + 1) * ALIGNMENT_BYTES

    tiles = [
        min(plan.tile_heads, layer.kv_heads)
        * (slot_bytes(layer.key_dim) + slot_bytes(layer.value_dim))
        for layer in plan.shape.kinds_of_full_layers
    ]
    return READS * plan.batch * max(tiles)
