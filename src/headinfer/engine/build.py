"""What an engine is made of on a device: where tiles come from, where new tokens go, and memory."""

from collections.abc import Sequence

from headinfer.device.base import Device, Edge
from headinfer.engine.keep import DirectKeeper, Keeper, PagedKeeper
from headinfer.engine.stats import Stats
from headinfer.engine.tiles import PrefetchedTiles, SynchronousTiles, TileSource, ViewTiles
from headinfer.kv.ledger import Ledger
from headinfer.kv.place import Arena
from headinfer.plan.memory import PAGES, STAGING_BUFFERS
from headinfer.plan.plan import Plan


def build(
    device: Device, plan: Plan, ledgers: Sequence[Ledger], stats: Stats
) -> tuple[TileSource, Keeper, int]:
    """Choose the strategies of a device, and take the memory a plan gives them.

    Args:
        device: where attention is computed.
        plan: sizes.
        ledgers: of the layers; each is given its memory for resident tokens.
        stats: where bytes are counted.

    Returns:
        The source of tiles, the keeper of new tokens, and the bytes of device memory taken.

    Raises:
        MemoryPlanError: the device has no such memory left.
    """
    if device.tiles_are_views:
        return ViewTiles(plan.tile_tokens), DirectKeeper(), 0
    arena = Arena(device, plan.arena_bytes)
    # What lay there before may still be in use on compute. Copy-out reads what compute wrote later.
    device.copy_in.wait(device.compute.record(), Edge.MEMORY_FREE)
    buffers = [arena.take(plan.staging_bytes // STAGING_BUFFERS) for _ in range(STAGING_BUFFERS)]
    page_tokens, chunk_bytes = plan.page_tokens, plan.chunk_page_bytes // PAGES
    tails = {
        ledger: [arena.take(ledger.geometry.num_bytes(page_tokens)) for _ in range(PAGES)]
        for ledger in ledgers
    }
    for ledger in ledgers:
        if plan.resident_tokens:
            piece = arena.take(ledger.geometry.num_bytes(plan.resident_tokens))
            ledger.keep_residents(piece, plan.resident_tokens)
    keeper = PagedKeeper(
        device,
        tails=tails,
        chunk_pages=[arena.take(chunk_bytes) for _ in range(PAGES)],
        page_tokens=page_tokens,
        chunk_tokens=plan.chunk_tokens,
        stats=stats,
    )
    if not plan.overlap:
        source = SynchronousTiles(device, buffers[0], plan.tile_tokens, stats)
        return source, keeper, arena.num_bytes
    prefetched = PrefetchedTiles(
        device,
        ledgers,
        buffers,
        tile_heads=plan.tile_heads,
        tile_tokens=plan.tile_tokens,
        stats=stats,
    )
    return prefetched, keeper, arena.num_bytes
