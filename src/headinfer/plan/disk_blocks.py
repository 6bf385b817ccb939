"""How host memory above a disk is cut into blocks. Pure arithmetic."""

import math
from collections.abc import Sequence
from dataclasses import replace

from headinfer.errors import MemoryPlanError
from headinfer.plan.format import Format
from headinfer.plan.memory import (
    DISK_ALIGNMENT_BYTES,
    block_bytes,
    blocks_bytes,
    covering_tokens,
)
from headinfer.plan.plan import Plan
from headinfer.plan.shape import LayerShape, ModelShape
from headinfer.units import format_bytes

READS = 8
"""Tiles that are on their way from the disk, or waiting for the link."""

WRITES = 4
"""Blocks that are on their way to the disk at most, while others take their place."""

_WRITES_PART = 4
"""One such part of the host memory beyond the least, at most, is for these blocks."""

_MOST_BLOCK_TOKENS = 4096
"""Tokens of a block at most. At 128 KiB of KV a token the blocks of all layers are 512 MiB."""

LEAST_BLOCKS = 2
"""Blocks of a layer in memory: one is filled, and the one before may still be on its way."""

_GOOD_BLOCKS = 8
"""With so many a layer's memory is well used, as the newest one is half empty on average."""


def with_disk(plan: Plan, room_bytes: int, block_tokens: int = 0) -> Plan:
    """Return a plan whose tokens lie in blocks, as many of them in host memory as there is room.

    A block has whole tiles where that can be, so that attention has the same tiles as without a
    disk. Each head of a dense block begins at an alignment, so that a tile is read in few large
    reads. Packed blocks have whole pages, and theirs begin anywhere.

    Args:
        plan: without a disk.
        room_bytes: host memory that the cache may take.
        block_tokens: of the blocks that it has already, which stay as large; 0 where it has none.

    Raises:
        MemoryPlanError: that is too little.
    """
    (found,) = all_with_disk([plan], room_bytes, [block_tokens])
    return found


def all_with_disk(
    plans: Sequence[Plan], room_bytes: int, block_tokens: Sequence[int] = ()
) -> list[Plan]:
    """Return plans of layers on several devices, whose blocks share host memory; see `with_disk`.

    Each has what it needs at least. The rest is divided by the bytes of a token, so that as many
    tokens of each layer are in memory.

    Args:
        plans: of each device, without a disk.
        room_bytes: host memory that the cache may take in all.
        block_tokens: of the blocks that each has already; 0 where one has none, empty where none
            has.

    Raises:
        MemoryPlanError: that is too little.
    """
    given = block_tokens or [0] * len(plans)
    known = [
        (have or _least_block_tokens(plan)) if plan.shape.kinds_of_full_layers else 0
        for plan, have in zip(plans, given, strict=True)
    ]
    if not any(known):
        return list(plans)
    least = [_least_bytes(plan, tokens) for plan, tokens in zip(plans, known, strict=True)]
    left_bytes = room_bytes - sum(least)
    if left_bytes < 0:
        raise MemoryPlanError(
            f"a KV cache with a disk below needs {format_bytes(sum(least))} of CPU memory at "
            f"least, and {format_bytes(max(room_bytes, 0))} can be had; give more host_memory or "
            "smaller tiles"
        )
    weights = [plan.shape.host_kv_bytes(_MOST_BLOCK_TOKENS) for plan in plans]
    shares = _divided(left_bytes, least, weights)
    tokens = [
        (have or _block_tokens(plan, share)) if least_tokens else 0
        for plan, share, have, least_tokens in zip(plans, shares, given, known, strict=True)
    ]
    staging = [_staging_bytes(*each) for each in zip(plans, tokens, shares, strict=True)]
    left_bytes -= sum(staging)
    shares = _divided(left_bytes, least, weights)
    return [_in_blocks(*each) for each in zip(plans, shares, tokens, staging, strict=True)]


def _divided(left_bytes: int, least: Sequence[int], weights: Sequence[int]) -> list[int]:
    """Return what each has at least, and its share by weight of what is left."""
    return [
        needed + left_bytes * weight // sum(weights)
        for needed, weight in zip(least, weights, strict=True)
    ]


def _in_blocks(plan: Plan, room_bytes: int, block_tokens: int, staging_bytes: int) -> Plan:
    """Return a plan in blocks of so many tokens; there is room for them beside the staging."""
    if not block_tokens:
        return plan
    return replace(
        plan,
        disk_block_tokens=block_tokens,
        disk_host_blocks=_blocks(plan, block_tokens, room_bytes),
        disk_buffers_bytes=_buffers_bytes(plan, block_tokens),
        disk_staging_bytes=staging_bytes,
    )


def _least_bytes(plan: Plan, block_tokens: int) -> int:
    """Return the host memory that a plan in blocks of so many tokens needs; 0 for no blocks."""
    if not block_tokens:
        return 0
    tokens = LEAST_BLOCKS * block_tokens
    held_bytes = blocks_bytes(plan.shape, tokens, block_tokens, plan.batch)
    return held_bytes + _beside_bytes(plan, block_tokens)


def _least_block_tokens(plan: Plan) -> int:
    """Return the tokens of the smallest blocks that keep tiles whole, where that can be."""
    unit = math.lcm(*(_unit(layer, plan.shape) for layer in plan.shape.kinds_of_full_layers))
    tiled = math.lcm(unit, plan.tile_tokens)
    return tiled if tiled <= _MOST_BLOCK_TOKENS else unit


def _block_tokens(plan: Plan, room_bytes: int) -> int:
    """Return the tokens of a block, where nothing is kept in other ones."""
    block_tokens = _least_block_tokens(plan)
    most = max(_MOST_BLOCK_TOKENS, block_tokens)
    while 2 * block_tokens <= most and _blocks(plan, 2 * block_tokens, room_bytes) >= _GOOD_BLOCKS:
        block_tokens *= 2
    return block_tokens


def _unit(layer: LayerShape, shape: ModelShape) -> int:
    """Return the tokens that blocks of a layer have a multiple of."""
    if layer.host_format is not Format.DENSE:
        return layer.host_format.row_tokens
    rows = [dim * shape.kv_itemsize for dim in (layer.key_dim, layer.value_dim)]
    units = (DISK_ALIGNMENT_BYTES // math.gcd(DISK_ALIGNMENT_BYTES, row) for row in rows)
    return math.lcm(*units)


def _blocks(plan: Plan, block_tokens: int, room_bytes: int) -> int:
    """Return the blocks of each layer that there is room for beside all else."""
    left = room_bytes - _beside_bytes(plan, block_tokens)
    return max(left // blocks_bytes(plan.shape, block_tokens, block_tokens, plan.batch), 0)


def _beside_bytes(plan: Plan, block_tokens: int) -> int:
    """Return the host memory beside blocks: buffers, and pages that do not pack."""
    return _buffers_bytes(plan, block_tokens) + plan.raw_page_bytes


def _staging_bytes(plan: Plan, block_tokens: int, room_bytes: int) -> int:
    """Return the bytes of blocks that are being written; 0 where each write is waited for.

    Plans without overlap wait, and those with the least memory.
    """
    if not block_tokens:
        return 0
    sizes = [
        plan.batch * layer.host_bytes(block_tokens, plan.shape.kv_itemsize)
        for layer in plan.shape.kinds_of_full_layers
    ]
    size = block_bytes(max(sizes))
    beyond = max(room_bytes - _least_bytes(plan, block_tokens), 0)
    return min(WRITES * plan.overlap, beyond // _WRITES_PART // size) * size


def _buffers_bytes(plan: Plan, block_tokens: int) -> int:
    """Return the bytes of all buffers: a tile each, by whole alignments of each head."""
    shape, tokens = plan.shape, min(plan.tile_tokens, block_tokens)

    def part_bytes(layer: LayerShape, dim: int) -> int:
        form = layer.host_format
        rows, heads = form.rows(covering_tokens(form, tokens)), min(plan.tile_heads, layer.kv_heads)
        size = block_bytes(rows * form.row_bytes(dim, shape.kv_itemsize))
        # A tile that begins behind an alignment takes one more. Packed heads do so, each elsewhere:
        # what lies between two of them is up to three.
        apart = 1 if form is Format.DENSE else 3
        heads *= plan.batch
        return heads * size + ((heads - 1) * apart + 1) * DISK_ALIGNMENT_BYTES

    tiles = [
        part_bytes(layer, layer.key_dim) + part_bytes(layer, layer.value_dim)
        for layer in shape.kinds_of_full_layers
    ]
    return READS * max(tiles)
