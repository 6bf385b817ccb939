"""What an engine is made of on a device: where tiles come from, where new tokens go, and memory."""

from collections.abc import Sequence

from headinfer.device.base import Device, Edge
from headinfer.engine.arena import Arena
from headinfer.engine.pages import DirectWriter, Page, PagedWriter, Writer
from headinfer.engine.resident import Resident
from headinfer.engine.stats import Stats
from headinfer.engine.tiles import (
    Buffer,
    PrefetchedTiles,
    StoredLayer,
    SynchronousTiles,
    TileSource,
    ViewTiles,
)
from headinfer.plan.memory import PAGES, STAGING_BUFFERS
from headinfer.plan.plan import Plan


def build(
    device: Device, plan: Plan, layers: Sequence[StoredLayer], stats: Stats
) -> tuple[TileSource, Writer, int]:
    """Choose the strategies of a device, and take the memory a plan gives them.

    Args:
        device: where attention is computed.
        plan: sizes.
        layers: the stores; each is given its memory for resident tokens.
        stats: where bytes are counted.

    Returns:
        The source of tiles, the writer of new tokens, and the bytes of device memory taken.

    Raises:
        MemoryPlanError: the device has no such memory left.
    """
    if device.tiles_are_views:
        return ViewTiles(layers, plan.tile_tokens), DirectWriter(layers), 0
    arena = Arena(device, plan.arena_bytes)
    # The allocator may hand out memory that work already enqueued on compute still uses.
    fresh = device.compute.record()
    device.copy_in.wait(fresh, Edge.TILE_FREE)
    device.copy_out.wait(fresh, Edge.PAGE_WRITTEN)
    buffers = [
        Buffer(arena.take(plan.staging_bytes // STAGING_BUFFERS)) for _ in range(STAGING_BUFFERS)
    ]
    tails = [
        [Page(arena.take(layer.store.geometry.num_bytes(plan.page_tokens))) for _ in range(PAGES)]
        for layer in layers
    ]
    for layer in layers:
        layer.resident = None
        if plan.resident_tokens:
            geometry = layer.store.geometry
            memory = arena.take(geometry.num_bytes(plan.resident_tokens))
            layer.resident = Resident(device, memory, geometry, plan.resident_tokens)
    chunk_pages = [Page(arena.take(plan.chunk_page_bytes // PAGES)) for _ in range(PAGES)]
    writer = PagedWriter(
        device,
        layers,
        tails=tails,
        chunk_pages=chunk_pages,
        page_tokens=plan.page_tokens,
        chunk_tokens=plan.chunk_tokens,
        stats=stats,
    )
    source: TileSource
    if plan.overlap:
        source = PrefetchedTiles(
            device,
            layers,
            buffers,
            tile_heads=plan.tile_heads,
            tile_tokens=plan.tile_tokens,
            stats=stats,
        )
    else:
        source = SynchronousTiles(device, layers, buffers[0], plan.tile_tokens, stats)
    return source, writer, arena.num_bytes
