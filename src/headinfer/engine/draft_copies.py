"""Copies of tokens into the places that drafts attend: over the link, or from the device itself."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from headinfer.device.base import Device, Edge
from headinfer.engine.disk_tiles import in_memory
from headinfer.engine.packing import bring
from headinfer.engine.stats import Stats
from headinfer.kv.extent import Tile
from headinfer.kv.ledger import Ledger
from headinfer.kv.pair import KV
from headinfer.plan.format import Format


class _Copy(NamedTuple):
    """A copy to be made: from where, and to where, within a ledger's place for drafts."""

    ledger: Ledger
    source: Tile
    place: Tile


class DraftCopies:
    """A writer of what drafts attend, into the ledgers of layers that keep all tokens.

    Args:
        device: where drafts are attended.
        stats: where bytes are counted.
    """

    def __init__(self, device: Device, stats: Stats) -> None:
        self._device = device
        self._stats = stats

    def fill(self, ledgers: Sequence[Ledger]) -> None:
        """Have all copies there for drafts that come next, valid on compute.

        What is there already is not copied again. What the device has elsewhere takes no link. May
        be called again where it was interrupted.
        """
        over_link: list[_Copy] = []
        here: list[_Copy] = []
        for ledger in ledgers:
            for copy, on_device in _copies(ledger):
                (here if on_device or self._device.tiles_are_views else over_link).append(copy)
        try:
            if over_link:
                self._fetch(over_link)
            for copy in here:
                self._copy_here(copy)
        except Exception:
            for ledger in ledgers:
                assert ledger.draft is not None
                ledger.draft.forget()  # some of it was overwritten
            raise
        for ledger in ledgers:
            assert ledger.draft is not None
            ledger.draft.begin(ledger.tokens)

    def _fetch(self, copies: Sequence[_Copy]) -> None:
        """Copy what the host alone has: on copy-in, and on compute what was packed, or on the disk.

        Tiles of the next pass stay on their way from the disk, so that buffers are not free.
        """
        compute, copy_in = self._device.compute, self._device.copy_in
        copy_in.wait(compute.record(), Edge.DRAFT_FREE)
        for ledger, source, place in copies:
            if source.piece.ready is not None:
                copy_in.wait(source.piece.ready, Edge.HOST_WRITTEN)
            self._stats.bytes_to_device += ledger.home.num_bytes(source.tokens)
            if source.format is not Format.DENSE:
                bring(self._device, ledger, source, place.kv)
                continue
            if source.piece.region is not None:
                self._write_here(place, in_memory(source).kv)
                continue
            for to, tokens in zip(place.kv, source.kv, strict=True):
                copy_in.copy(to, tokens)
        compute.wait(copy_in.record(), Edge.DRAFT_FILLED)

    def _copy_here(self, copy: _Copy) -> None:
        """Copy what the device has, on compute."""
        source, place = copy.source, copy.place
        source.piece.wait_ready(self._device)  # on the CPU there is nothing to wait for
        if self._device.checks_accesses:
            self._device.compute.reads(source.piece.memory, "tokens that drafts are to attend")
        self._write_here(place, source.kv)

    def _write_here(self, place: Tile, kv: KV) -> None:
        """Write tokens on compute; those of the CPU's memory, once compute is there."""
        for part in place.kv if self._device.checks_accesses else ():
            self._device.compute.writes(part, "tokens that drafts are to attend")
        place.kv.copy_(kv)


def _copies(ledger: Ledger) -> Iterator[tuple[_Copy, bool]]:
    """Yield the copies that a ledger's place for drafts lacks, and whether the device has them."""
    draft = ledger.draft
    assert draft is not None
    for start, end, slot in draft.lacking(ledger.tokens):
        for source, on_device in _tiles(ledger, start, end):
            first = slot + source.start - start
            place = draft.tile(first, first + source.tokens)
            yield _Copy(ledger, source, place), on_device


def _tiles(ledger: Ledger, start: int, end: int) -> Iterator[tuple[Tile, bool]]:
    """Yield some tokens where they lie, on the device where that has them, and whether it has."""
    for extent in (ledger.resident, ledger.tail):
        if extent is not None and extent.start == 0 and start < extent.end:
            stop = min(end, extent.end)
            yield extent.tile(start, stop), True
            start = stop
    if start < (stop := min(end, ledger.host_tokens)):
        for tile in ledger.host_tiles(start, stop):
            yield tile, False
        start = stop
    if start < end:
        assert ledger.tail is not None
        yield ledger.tail.tile(start, end), True
