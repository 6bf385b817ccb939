"""Moving tokens between pages on the device and the host's memory; when, a schedule says.

A device with memory of its own keeps the newest tokens of every layer, as the layer's tail, until
they are worth a transfer. The tail lies right behind the resident tokens while there is room, so
that one call attends both. After that it lies in a page of its own. A prefill chunk that fits
behind the resident tokens is kept there. Another goes through one of two pages that all layers
share. Compute fills a page, copy-out empties it, and neither overtakes the other.
"""

from collections.abc import Callable, Iterable, Sequence

import torch

from headinfer.device.base import Device, Edge, Event
from headinfer.engine.disk_tiles import DiskTiles
from headinfer.engine.packing import Packing, bring
from headinfer.engine.stats import Stats
from headinfer.errors import DiskError, MemoryPlanError
from headinfer.kv.extent import Extent, Piece, Tile, copy_rows
from headinfer.kv.ledger import Ledger
from headinfer.kv.pair import KV
from headinfer.plan.format import Format
from headinfer.schedule.steps import Where


class Pages:
    """A writer of new tokens into ledgers, which sends them home.

    Args:
        device: where the pages are.
        tail_pages: returns two pages of `page_tokens` tokens for each layer. It is called when the
            first is needed, which may be long after a prompt: not where all is host memory.
        chunk_pages: two pages of `chunk_tokens` tokens that all layers share; none there, too.
        page_tokens: tokens of a page of a layer.
        chunk_tokens: the most tokens that are taken at once.
        stats: where bytes are counted.
        packing: packs what goes home, where that is packed; None where nothing is.
        disk: reads tiles that are on the disk; None where none is.
    """

    def __init__(
        self,
        device: Device,
        *,
        tail_pages: Callable[[], dict[Ledger, list[Piece]]],
        chunk_pages: list[Piece],
        page_tokens: int,
        chunk_tokens: int,
        stats: Stats,
        packing: Packing | None = None,
        disk: DiskTiles | None = None,
    ) -> None:
        self._device = device
        self._disk = disk
        self._packing = packing
        self._tail_pages = tail_pages
        self._tails: dict[Ledger, list[Piece]] = {}
        self._chunk_pages = chunk_pages
        self._page_tokens = page_tokens
        self._chunk_tokens = chunk_tokens
        self._stats = stats

    def keep(self, ledger: Ledger, new: KV, where: Where) -> None:
        """Write new tokens behind those of a place.

        Args:
            ledger: of the layer.
            new: `[batch, kv_heads, new_tokens, dim]`, written by compute.
            where: in which place; a page begins where there is none.
        """
        if where is Where.HOST:
            self._write_home(ledger, new)
        elif where is Where.PAGE:
            self._write(ledger, ledger.tail or self._begin_page(ledger), new)
        else:
            if ledger.tail is not None:
                ledger.end_tail()  # it is empty: its first token never came
            if where is Where.RESIDENT:
                assert ledger.resident is not None
                self._write(ledger, ledger.resident, new)
            else:
                page = ledger.begin_tail(self._chunk_pages[0], self._chunk_tokens)
                self._write(ledger, page, new)

    def _write_home(self, ledger: Ledger, new: KV) -> None:
        """Write straight to the host, whose memory the device shares."""
        first = 0
        for tile in ledger.extend_host(new.tokens):
            tile.kv.copy_(new.cut(slice(first, first + tile.tokens)))
            first += tile.tokens

    def residents_with_room(self, ledger: Ledger) -> Extent:
        """Return the residents, which are all tokens, for compute to write one behind them."""
        resident = ledger.resident
        assert resident is not None
        if ledger.tail is not None:
            ledger.end_tail()
        if resident.piece.ready is not None:
            resident.piece.wait_ready(self._device)
        return resident

    def state_token(self, tile: Tile) -> None:
        """State, where that is checked, that compute attends a tile and writes its last place."""
        if self._device.checks_accesses:
            self._device.compute.reads(tile.piece.memory, "attention to tokens kept here")
            for part in tile.newest(1).kv:
                self._device.compute.writes(part, "new tokens")

    def near(self, ledger: Ledger, where: Where) -> Tile:
        """Return all tokens of the residents or the page, for compute to read."""
        extent = ledger.resident if where is Where.RESIDENT else ledger.tail
        assert extent is not None
        piece = extent.piece
        if piece.ready is not None:
            piece.wait_ready(self._device)
        if self._device.checks_accesses:
            self._device.compute.reads(piece.memory, "attention to tokens kept here")
        return Tile(extent.start, extent.tokens, piece, extent.whole)

    def page_with_room(self, ledger: Ledger) -> Extent:
        """Return the page, for compute to write a token there; one begins where there is none."""
        tail = ledger.tail or self._begin_page(ledger)
        if tail.piece.ready is not None:
            tail.piece.wait_ready(self._device)
        return tail

    def _begin_page(self, ledger: Ledger) -> Extent:
        """Have new tokens of a layer go to a page of its own."""
        if not self._tails:
            self._tails = self._tail_pages()
        return ledger.begin_tail(self._tails[ledger][0], self._page_tokens)

    def send_home(self, ledger: Ledger, *, turn: bool = True) -> None:
        """Have the host hold all tokens.

        Args:
            ledger: of the layer.
            turn: whether to go on in another page of the layer's own.
        """
        tail = ledger.tail
        if tail is None:
            self.send_residents([ledger])
        else:
            shared = tail.piece is self._chunk_pages[0]
            self._send_page(ledger, tail)
            if shared or turn:
                pages = self._chunk_pages if shared else self._tails[ledger]
                pages.append(pages.pop(0))

    def fill_residents(self, ledger: Ledger) -> None:
        """Fetch all tokens from the host that fit, on copy-in; the host must be at rest."""
        resident = ledger.resident
        if resident is None:
            return
        assert not resident.tokens, "what is kept must not be fetched again"
        copy_in, tokens = self._device.copy_in, min(ledger.host_tokens, resident.capacity)
        for tile in ledger.host_tiles(0, tokens):
            place = resident.tile(tile.start, tile.start + tile.tokens).kv
            if tile.format is not Format.DENSE:
                bring(self._device, ledger, tile, place)
            elif tile.piece.region is not None:
                assert self._disk is not None
                self._disk.copy_all(tile, place)
            else:
                copy_in.copy(place.keys, tile.kv.keys)
                copy_in.copy(place.values, tile.kv.values)
        packed = ledger.home.format is not Format.DENSE
        resident.piece.ready = None if packed else copy_in.record()
        ledger.lengthen(resident, tokens)  # not before there is something to wait for
        self._stats.bytes_to_device += ledger.home.num_bytes(resident.tokens)

    def select(self, ledger: Ledger, rows: Sequence[int]) -> None:
        """Make row `i` on the device what row `rows[i]` was, for as many rows as there are."""
        for extent in (ledger.resident, ledger.tail):
            if extent is not None and extent.tokens:
                extent.piece.wait_ready(self._device)
                self._device.compute.writes(extent.piece.memory, "row selection")
                copy_rows(extent, extent, torch.tensor(rows, device=extent.whole.keys.device))
                # Compute may be another thread's stream when the tokens are read or sent.
                extent.piece.ready = self._device.compute.record()

    def _write(self, ledger: Ledger, extent: Extent, new: KV) -> None:
        """Put tokens behind those of an extent on the device, on compute."""
        piece = extent.piece
        if piece.ready is not None:
            piece.wait_ready(self._device)
        if piece.free is not None:
            self._device.compute.wait(piece.free, Edge.PAGE_FREE)
            piece.free = None
        first, tokens = extent.tokens, new.keys.shape[2]
        ledger.lengthen(extent, tokens)
        both = ledger.geometry.joint(extent.whole, first, tokens)
        places = (
            [part.narrow(2, first, tokens) for part in extent.whole] if both is None else [both]
        )
        if self._device.checks_accesses:
            for place in places:
                self._device.compute.writes(place, "new tokens")
        if both is not None:
            torch.cat(new, out=both)  # one launch, where two copies are two
        else:
            KV(*places).copy_(new)

    def _send_page(self, ledger: Ledger, page: Extent) -> None:
        """Send a page home; keep what may be resident on the way."""
        tile = page.tile(page.start, page.end)
        ledger.half_done = True
        page.piece.free = self._send([(ledger, tile)])
        self._make_resident(ledger, tile)
        ledger.end_tail()
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

    def send_residents(self, ledgers: Iterable[Ledger]) -> None:
        """Send the resident tokens that the host lacks.

        Nothing is written over them before they arrived: a crop that reaches host tokens waits.

        Args:
            ledgers: of layers; one whose host lacks none is passed by.
        """
        lacking = []
        for ledger in ledgers:
            resident = ledger.resident
            if resident is not None and resident.tokens > ledger.host_tokens:
                lacking.append((ledger, resident.tile(ledger.host_tokens, resident.tokens)))
        if not lacking:
            return
        try:
            self._send(lacking)
        except (DiskError, MemoryPlanError):  # those before are there, and the others as they were
            _end_changes(lacking)
            raise
        _end_changes(lacking)

    def _send(self, tiles: Sequence[tuple[Ledger, Tile]]) -> Event | None:
        """Send tokens of layers, which compute wrote, to the host's end on copy-out.

        The layers are half done after this, as the caller has more to do.

        Returns:
            The event on copy-out when they were read; None where compute alone reads them.
        """
        device, written = self._device, False
        copy_out, targets = device.copy_out, []
        for ledger, tile in tiles:  # first: what it takes long to wait for leaves nothing half done
            if not ledger.half_done:
                ledger.reserve(tile.start + ledger.sent_at_once(tile.tokens))
        try:
            for ledger, tile in tiles:
                ready = tile.piece.ready
                if ledger.home.format is not Format.DENSE:
                    tile.piece.wait_ready(device)
                    device.compute.reads(tile.piece.memory, "tokens to be packed")
                else:
                    if not written:
                        copy_out.wait(device.compute.record(), Edge.PAGE_WRITTEN)
                        written = True
                    if ready is not None:
                        copy_out.wait(ready, Edge.PAGE_WRITTEN)
                ledger.half_done = True
                targets += self._send_tile(ledger, tile)
        finally:
            sent = copy_out.record()
            for target in targets:
                target.piece.ready = sent
        return sent if written else None

    def _send_tile(self, ledger: Ledger, tile: Tile) -> list[Tile]:
        """Send tokens of a layer; return where the last of them go, for the caller's event."""
        first = 0
        while True:
            tokens = ledger.sent_at_once(tile.tokens - first)
            try:
                targets = ledger.extend_host(tokens)
                for target in targets:  # pages that do not pack may lack memory
                    self._send_part(ledger, target, tile)
            except (DiskError, MemoryPlanError):
                self._take_back(ledger, tile)
                raise
            first += tokens
            if first == tile.tokens:
                return targets
            sent = self._device.copy_out.record()
            for target in targets:  # the next block may take the memory of this one
                target.piece.ready = sent

    def _send_part(self, ledger: Ledger, target: Tile, tile: Tile) -> None:
        """Send those of some tokens that go to one extent, packed where the host has them so."""
        first, tokens = target.start - tile.start, target.tokens
        if target.format is not Format.DENSE:
            assert self._packing is not None
            whole = tokens == tile.tokens
            new = tile.kv if whole else tile.kv.cut(slice(first, first + tokens))
            self._packing.send(ledger, target, new)
            return
        first += tile.first
        self._device.copy_out.copy_tokens(target.whole, target.first, tile.whole, first, tokens)
        self._stats.bytes_to_host += ledger.home.num_bytes(tokens)

    def _take_back(self, ledger: Ledger, tile: Tile) -> None:
        """Have the host hold none of some tokens, part of which were sent; the page has them."""
        for stream in (self._device.copy_in, self._device.copy_out, self._device.host_work):
            stream.record().synchronize(Edge.HOST_SETTLED)
        ledger.crop_host(tile.start)
        ledger.half_done = False


def _end_changes(changed: Iterable[tuple[Ledger, Tile]]) -> None:
    """Note that no change of layers is half done any more."""
    for ledger, _ in changed:
        ledger.half_done = False
