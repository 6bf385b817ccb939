"""What an engine is made of on a device: where tiles come from, where new tokens go, and memory."""

import itertools
from collections.abc import Sequence

from headinfer.attend.native.ahead import begin_compiling
from headinfer.device.base import Device, Edge
from headinfer.engine.codecs import check_codec, codec_of
from headinfer.engine.disk_tiles import DiskTiles
from headinfer.engine.fetch import InPlaceTiles, OverlappedTiles, TileSource
from headinfer.engine.fetch_in_turn import SequentialTiles
from headinfer.engine.packing import Packing
from headinfer.engine.pages import Pages
from headinfer.engine.raw_pages import RawPages
from headinfer.engine.stats import Stats
from headinfer.kv.extent import Piece
from headinfer.kv.ledger import Ledger
from headinfer.kv.pair import KV
from headinfer.kv.place import Arena
from headinfer.kv.write_behind import aligned_host
from headinfer.plan.disk_blocks import READS
from headinfer.plan.format import Format
from headinfer.plan.memory import (
    MOST_DRAFTED,
    PAGES,
    STAGING_BUFFERS,
    aligned,
)
from headinfer.plan.plan import Plan
from headinfer.schedule.route import Sizes


def build(
    device: Device,
    plan: Plan,
    sizes: Sizes,
    ledgers: Sequence[Ledger],
    stats: Stats,
    raw: RawPages | None = None,
) -> tuple[TileSource, Pages, int, RawPages | None]:
    """Choose the strategies of a device, and take the memory a plan gives them.

    Args:
        device: where attention is computed.
        plan: the memory there is.
        sizes: of tiles and pages.
        ledgers: of the layers; each is given its memory for resident tokens.
        stats: where bytes are counted.
        raw: what takes pages that do not pack, under a plan before; used on where it is enough.

    Returns:
        The source of tiles, the pages of new tokens, and the bytes of device memory taken. The last
        is what takes pages that do not pack, or None.

    Raises:
        MemoryPlanError: the device has no such memory left.
    """
    assert sizes.in_place == device.tiles_are_views, "the plan is for a device of another kind"
    page_tokens, chunk_tokens = plan.page_tokens, plan.chunk_tokens
    arena = Arena(device, plan.arena_bytes)
    if plan.draft_tokens:
        for ledger in ledgers:
            piece = arena.take(ledger.geometry.num_bytes(plan.draft_tokens + MOST_DRAFTED))
            ledger.keep_drafts(piece, plan.draft_tokens, MOST_DRAFTED)

    tails = arena.take(plan.tail_bytes).memory

    def tail_pages() -> dict[Ledger, list[Piece]]:
        # Whoever is interrupted and asks again finds them where they were.
        pages: dict[Ledger, list[Piece]] = {}
        start = 0
        for ledger in ledgers:
            num_bytes = ledger.geometry.num_bytes(page_tokens)
            size = aligned(num_bytes)
            starts = range(start, start + PAGES * size, size)
            pages[ledger] = [Piece(tails[at : at + num_bytes]) for at in starts]
            start += PAGES * size
        return pages

    if device.tiles_are_views:
        pages = Pages(
            device,
            tail_pages=tail_pages,
            chunk_pages=[],
            page_tokens=page_tokens,
            chunk_tokens=chunk_tokens,
            stats=stats,
        )
        return InPlaceTiles(plan.tile_tokens), pages, arena.num_bytes, None
    if plan.host_share:
        _compile_ahead(plan, ledgers)
    # What lay there before may still be in use on compute. Copy-out reads what compute wrote later.
    device.copy_in.wait(device.compute.record(), Edge.MEMORY_FREE)
    buffers = [arena.take(plan.staging_bytes // STAGING_BUFFERS) for _ in range(STAGING_BUFFERS)]
    if plan.resident_tokens:
        _keep_residents(arena, ledgers, plan.resident_tokens)
    raw = _raw_pages(device, plan, raw)
    packing = None if raw is None else _packing(device, plan, arena, ledgers, stats, raw)
    disk = _disk_tiles(device, plan, stats)
    pages = Pages(
        device,
        tail_pages=tail_pages,
        chunk_pages=[arena.take(plan.chunk_page_bytes // PAGES) for _ in range(PAGES)],
        page_tokens=page_tokens,
        chunk_tokens=chunk_tokens,
        stats=stats,
        packing=packing,
        disk=disk,
    )
    if plan.overlap:
        source: TileSource = OverlappedTiles(device, ledgers, buffers, sizes, stats, packing, disk)
    else:
        source = SequentialTiles(device, buffers[0], stats, packing, disk)
    return source, pages, arena.num_bytes, raw


def _compile_ahead(plan: Plan, ledgers: Sequence[Ledger]) -> None:
    """Have kernels that attend the host's share compiled while the prompt before it is read."""
    for geometry, form in {(ledger.geometry, ledger.home.format) for ledger in ledgers}:
        if geometry.key_dim == geometry.value_dim:  # as its kernels take them
            rows = plan.shape.query_heads // plan.shape.kv_heads
            begin_compiling(geometry.dtype, geometry.key_dim, rows, form)


def _keep_residents(arena: Arena, ledgers: Sequence[Ledger], tokens: int) -> None:
    """Give layers memory for residents: those alike at once, as a prompt waits for each view."""
    for geometry, alike in itertools.groupby(ledgers, key=lambda ledger: ledger.geometry):
        layers = list(alike)
        memory = arena.take_alike(geometry.num_bytes(tokens), len(layers))
        keys, values = (part.unbind() for part in geometry.carve(memory, tokens))
        for ledger, piece, *whole in zip(layers, memory.unbind(), keys, values, strict=True):
            ledger.keep_residents(Piece(piece), tokens, KV(*whole))


def _disk_tiles(device: Device, plan: Plan, stats: Stats) -> DiskTiles | None:
    """Return what reads tiles from the disk, with its buffers; None where no disk lies below."""
    if not plan.disk_buffers_bytes:
        return None
    size = plan.disk_buffers_bytes // READS
    buffers = [Piece(aligned_host(device, size)) for _ in range(READS)]
    return DiskTiles(
        device, buffers, stats, tile_heads=plan.tile_heads, tile_tokens=plan.tile_tokens
    )


def _raw_pages(device: Device, plan: Plan, before: RawPages | None) -> RawPages | None:
    """Return what takes pages that do not pack; None where nothing is packed.

    Each anew would begin a block, and tokens that are there keep the blocks before.
    """
    if not plan.shape.packs:
        return None
    if before is None or not before.serves(plan.raw_room):
        return RawPages(device, plan.raw_room)
    before.go_on_in(plan.raw_room)
    return before


def _packing(
    device: Device,
    plan: Plan,
    arena: Arena,
    ledgers: Sequence[Ledger],
    stats: Stats,
    raw: RawPages,
) -> Packing:
    """Return what packs and unpacks tokens, with its memory."""
    home = next(each.home for each in ledgers if each.home.format is not Format.DENSE)
    check_codec(home.format, device.torch_device, home.dtype, plan.shape.packed_dims)
    return Packing(
        device,
        codec_of(home.format, device.torch_device),
        arena.take(plan.unpacked_bytes),
        [arena.take(plan.packed_bytes // PAGES) for _ in range(PAGES)],
        raw,
        stats,
    )
