"""How new tokens come to lie where the cache keeps them: on the host at once, or by pages.

On a device with memory of its own the newest tokens of every layer stay there, as the layer's tail,
until they are worth a transfer: right behind the resident tokens while there is room, so that one
call attends both, and in a page of their own after that. A prefill chunk goes through one of two
pages that all layers share. Compute fills a page, copy-out empties it, and neither overtakes the
other.
"""

from collections.abc import Sequence
from typing import Protocol

import torch

from headinfer.device.base import Device, Edge, Event
from headinfer.engine.stats import Stats
from headinfer.kv.extent import Extent, Piece, Tile
from headinfer.kv.ledger import Ledger, copy_rows
from headinfer.kv.pair import KV


class Keeper(Protocol):
    """Takes the new tokens of a layer into its ledger."""

    def make_room(self, ledger: Ledger, new_tokens: int) -> None:
        """Prepare for `new_tokens` tokens; may move older ones to the host."""

    def admit(self, ledger: Ledger, new: KV) -> list[Tile]:
        """Begin to take new tokens, before the layer is attended.

        A single new token, which sees all others and itself, becomes part of the past at once.

        Args:
            ledger: of which layer.
            new: `[batch, kv_heads, new_tokens, dim]`, written by compute.

        Returns:
            The past tokens that are on the device, for compute to read.
        """

    def extend(self, ledger: Ledger) -> Tile | None:
        """Take a single new token that compute itself is to write, instead of `admit`.

        Returns:
            All past tokens of the layer and a place behind them, on the device; None, with nothing
            taken, where they are not in one piece there.
        """

    def commit(self, ledger: Ledger, new: KV) -> None:
        """Finish taking them, after the layer is attended."""

    def flush(self, ledger: Ledger) -> None:
        """Have the host hold all tokens."""

    def fill_residents(self, ledger: Ledger) -> None:
        """Fetch the tokens that may be resident, none of which is on the device yet."""

    def select(self, ledger: Ledger, rows: Sequence[int]) -> None:
        """Make row `i` on the device what row `rows[i]` was, for as many rows as there are."""


class DirectKeeper:
    """Writes straight to the host, for a device that shares its memory."""

    def make_room(self, ledger: Ledger, new_tokens: int) -> None:
        """Do nothing: the ledger makes room as it is written."""

    def admit(self, ledger: Ledger, new: KV) -> list[Tile]:
        """Write a single token at once; nothing is anywhere but on the host."""
        if new.tokens == 1:
            self._write(ledger, new)
        return []

    def extend(self, ledger: Ledger) -> Tile | None:
        """Return None: what is attended where it lies need not be in one piece."""

    def commit(self, ledger: Ledger, new: KV) -> None:
        """Write a chunk once it is attended, so that the past still ended before it."""
        if new.tokens > 1:
            self._write(ledger, new)

    def _write(self, ledger: Ledger, new: KV) -> None:
        first = 0
        for tile in ledger.extend_host(new.tokens):
            tile.kv.copy_(new.cut(slice(first, first + tile.tokens)))
            first += tile.tokens

    def flush(self, ledger: Ledger) -> None:
        """Do nothing: the host holds all tokens."""

    def fill_residents(self, ledger: Ledger) -> None:
        """Do nothing: no token is resident."""

    def select(self, ledger: Ledger, rows: Sequence[int]) -> None:
        """Do nothing: nothing is on the device."""


class PagedKeeper:
    """Writes into pages on the device, which copy-out brings to the host.

    Args:
        device: where the pages are.
        tails: two pages of `page_tokens` tokens for each layer.
        chunk_pages: two pages of `chunk_tokens` tokens, shared by all layers.
        page_tokens: the most tokens that go through a tail; more go through a chunk page.
        chunk_tokens: the most tokens that are taken at once.
        stats: where bytes are counted.
    """

    def __init__(
        self,
        device: Device,
        *,
        tails: dict[Ledger, list[Piece]],
        chunk_pages: list[Piece],
        page_tokens: int,
        chunk_tokens: int,
        stats: Stats,
    ) -> None:
        self._device = device
        self._tails = tails
        self._chunk_pages = chunk_pages
        self._page_tokens = page_tokens
        self._chunk_tokens = chunk_tokens
        self._stats = stats

    def make_room(self, ledger: Ledger, new_tokens: int) -> None:
        """Send the tail home where the new tokens would make it longer than a page."""
        if ledger.tail_tokens + new_tokens > self._page_tokens:
            self.flush(ledger)

    def admit(self, ledger: Ledger, new: KV) -> list[Tile]:
        """Return the resident tokens and the tail, a single new token already in it."""
        if new.tokens == 1:
            self._append(ledger, new)
        near = []
        for extent in (ledger.resident, ledger.tail):
            if extent is not None and extent.tokens:
                extent.piece.wait_ready(self._device)
                self._device.compute.reads(extent.piece.memory, "attention to tokens kept here")
                near.append(Tile(extent.start, extent.tokens, extent.piece, extent.whole))
        return near

    def extend(self, ledger: Ledger) -> Tile | None:
        """Return the resident tokens and a place behind them where they are all there is."""
        resident, tokens = ledger.resident, ledger.tokens
        if resident is None or not tokens == resident.tokens < resident.capacity:
            return None
        self.make_room(ledger, 1)
        resident.piece.wait_ready(self._device)
        place = ledger.extend(resident, 1)
        if self._device.checks_accesses:
            self._state_writes(place)
            self._device.compute.reads(resident.piece.memory, "attention to resident tokens")
        return resident.tile(0, resident.tokens)

    def commit(self, ledger: Ledger, new: KV) -> None:
        """Put a few tokens into the tail, send more to the host, and empty a full page."""
        if 1 < new.tokens <= self._page_tokens:
            self._append(ledger, new)
        elif new.tokens > 1:
            page = ledger.begin_tail(self._chunk_pages[0], self._chunk_tokens)
            self._write(ledger, page, new)
            self._send_page(ledger, page, self._chunk_pages)
        if ledger.tail_tokens == self._page_tokens:
            self.flush(ledger)

    def flush(self, ledger: Ledger) -> None:
        """Send the tail to the host, and go on in the other page."""
        if ledger.tail is not None:
            self._send_page(ledger, ledger.tail, self._tails[ledger])
        else:
            self._send_residents(ledger)

    def fill_residents(self, ledger: Ledger) -> None:
        """Fetch all tokens from the host that fit, on copy-in; the host must be at rest."""
        resident = ledger.resident
        if resident is None:
            return
        assert not resident.tokens, "what is kept must not be fetched again"
        copy_in, tokens = self._device.copy_in, min(ledger.host_tokens, resident.capacity)
        for tile in ledger.host_tiles(0, tokens):
            place, source = resident.tile(tile.start, tile.start + tile.tokens).kv, tile.kv
            copy_in.copy(place.keys, source.keys)
            copy_in.copy(place.values, source.values)
        resident.piece.ready = copy_in.record()
        ledger.extend(resident, tokens)  # not before there is something to wait for
        self._stats.bytes_to_device += ledger.geometry.num_bytes(resident.tokens)

    def select(self, ledger: Ledger, rows: Sequence[int]) -> None:
        """Rearrange the resident tokens and the tail, on compute."""
        for extent in (ledger.resident, ledger.tail):
            if extent is not None and extent.tokens:
                extent.piece.wait_ready(self._device)
                self._device.compute.writes(extent.piece.memory, "row selection")
                copy_rows(extent, extent, torch.tensor(rows, device=extent.whole.keys.device))
                # Compute may be another thread's stream when the tokens are read or sent.
                extent.piece.ready = self._device.compute.record()

    def _append(self, ledger: Ledger, new: KV) -> None:
        """Put tokens into the tail: behind the residents while it is there and all of them fit."""
        tail, resident = ledger.tail, ledger.resident
        if tail is None:
            fits = resident is not None and ledger.tokens == resident.tokens
            if resident is not None and fits and resident.tokens + new.tokens <= resident.capacity:
                self._write(ledger, resident, new)
                return
            self._send_residents(ledger)
            tail = ledger.begin_tail(self._tails[ledger][0], self._page_tokens)
        self._write(ledger, tail, new)

    def _write(self, ledger: Ledger, extent: Extent, new: KV) -> None:
        """Put tokens behind those of an extent on the device, on compute."""
        piece = extent.piece
        piece.wait_ready(self._device)
        if piece.free is not None:
            self._device.compute.wait(piece.free, Edge.PAGE_FREE)
            piece.free = None
        place = ledger.extend(extent, new.tokens)
        self._state_writes(place)
        place.kv.copy_(new)

    def _state_writes(self, place: Tile) -> None:
        if self._device.checks_accesses:
            for part in place.kv:
                self._device.compute.writes(part, "new tokens")

    def _send_page(self, ledger: Ledger, page: Extent, pages: list[Piece]) -> None:
        """Send a page home and turn to the other; keep what may be resident on the way."""
        tile = page.tile(page.start, page.end)
        ledger.half_done = True
        page.piece.free = self._send(ledger, tile)
        self._make_resident(ledger, tile)
        ledger.end_tail()
        pages.append(pages.pop(0))
        ledger.half_done = False

    def _make_resident(self, ledger: Ledger, tile: Tile) -> None:
        """Keep those of some tokens on the device that follow the residents and fit."""
        resident = ledger.resident
        if resident is None or tile.start != resident.tokens:
            return
        tokens = min(tile.tokens, resident.capacity - tile.start)
        if tokens > 0:
            tile.piece.wait_ready(self._device)
            self._device.compute.reads(tile.piece.memory, "new tokens into the resident ones")
            self._write(ledger, resident, tile._replace(tokens=tokens).kv)

    def _send_residents(self, ledger: Ledger) -> None:
        """Send the resident tokens that the host lacks.

        Nothing is written over them before they arrived: a crop that reaches host tokens waits.
        """
        resident = ledger.resident
        if resident is not None and resident.tokens > ledger.host_tokens:
            ledger.half_done = True
            self._send(ledger, resident.tile(ledger.host_tokens, resident.tokens))
            ledger.half_done = False

    def _send(self, ledger: Ledger, tile: Tile) -> Event:
        """Send tokens that compute wrote to the host's end, on copy-out.

        Returns:
            The event on copy-out when they are there.
        """
        copy_out, source = self._device.copy_out, tile.kv
        copy_out.wait(self._device.compute.record(), Edge.PAGE_WRITTEN)
        if tile.piece.ready is not None:
            copy_out.wait(tile.piece.ready, Edge.PAGE_WRITTEN)
        targets = ledger.extend_host(tile.tokens)
        for target in targets:
            first = target.start - tile.start
            part, place = source.cut(slice(first, first + target.tokens)), target.kv
            copy_out.copy(place.keys, part.keys)
            copy_out.copy(place.values, part.values)
        self._stats.bytes_to_host += ledger.geometry.num_bytes(tile.tokens)
        sent = copy_out.record()
        for target in targets:
            target.piece.ready = sent
        return sent
