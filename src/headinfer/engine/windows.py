"""Heads that see a window of recent tokens: all of it stays on the device, and nothing is copied.

A window's tokens lie in one piece of memory, the new ones behind the old, so that one call attends
them. When the piece is full, what no query will see is dropped. The window stays, and as many
tokens before it as can be taken back; transformers' own windows keep these where they are told to
record. Sinks lie at the beginning of the piece and stay there. Compute alone touches them.
"""

import copy
from collections.abc import Sequence

import torch

from headinfer.device.base import Device
from headinfer.errors import CacheStateError
from headinfer.kv.extent import Extent, Piece, Tile, copy_rows
from headinfer.kv.ledger import Ledger
from headinfer.kv.pair import KV, Geometry
from headinfer.plan.memory import SPARE_TOKENS, window_capacity
from headinfer.units import counted


class WindowKeeper:
    """A writer of new tokens into the ledgers of layers with a window.

    Args:
        device: where the tokens are.
        page_tokens: the most new tokens that are written in place; for more, old and new ones are
            put together in memory of the call.
    """

    def __init__(self, device: Device, page_tokens: int) -> None:
        self._device = device
        self._page_tokens = page_tokens

    def take(self, ledger: Ledger, new: KV) -> Tile:
        """Keep new tokens, and return them behind the past tokens that their queries see.

        Args:
            ledger: of a layer with a window.
            new: `[batch, kv_heads, new_tokens, dim]`, written by compute.

        Returns:
            All in one piece, valid on compute until the next tokens are taken; without the sinks,
            unless the new tokens are sinks.
        """
        tail = self._with_room(ledger, new.tokens)
        low = tail.end - ledger.visible_tokens
        # There is always room for sinks.
        if new.tokens <= self._page_tokens or tail.end < ledger.track.sink_tokens:
            self._append(ledger, tail, new)
            return tail.tile(low, tail.end)
        first = low if new.tokens >= SPARE_TOKENS else tail.start + ledger.sink_tokens
        past = tail.tile(first, tail.end).kv
        both = KV(*(torch.cat(parts, dim=2) for parts in zip(past, new, strict=True)))
        all_tokens = Tile(first, both.tokens, Piece(both.keys), both)
        self._restart(ledger, tail, all_tokens)
        return all_tokens.newest(tail.end - low)

    def sinks(self, ledger: Ledger) -> Tile:
        """Return the sinks that queries see beside their window, valid on compute."""
        tail = ledger.tail
        assert tail is not None
        self._state(tail.piece, writes=False)
        return Tile(0, ledger.sink_tokens, tail.piece, tail.whole)

    def window_with_room(self, ledger: Ledger) -> Extent:
        """Return the window's tokens, for compute to write one behind them."""
        return self._with_room(ledger, 1)

    def _with_room(self, ledger: Ledger, tokens: int) -> Extent:
        """Return the tail, with room for some new tokens if so many are written in place."""
        tail = ledger.tail or self._begin(ledger)
        tail.piece.wait_ready(self._device)
        self._state(tail.piece, writes=False)
        if tail.limit - tail.end < tokens <= self._page_tokens:
            self._restart(ledger, tail, tail.tile(tail.start + ledger.sink_tokens, tail.end))
        return tail

    def check_crop(self, ledger: Ledger, tokens: int, *, streams: bool = False) -> None:
        """Refuse to keep only the first `tokens` tokens where those that are seen then are gone.

        Args:
            ledger: of a track with a window.
            tokens: to be kept.
            streams: whether these are heads that stream, and no layer with a window.

        Raises:
            CacheStateError: they were dropped.
        """
        if tokens < ledger.tokens and not ledger.can_crop(tokens):
            what, have = ("streaming heads", "have") if streams else ("a layer", "has")
            removed = ledger.tokens - tokens
            window = counted(ledger.past_tokens + 1, "token")
            raise CacheStateError(
                f"{counted(removed, 'token')} cannot be taken back: {what} with a window of "
                f"{window} {have} dropped those before them; "
                f"take back {SPARE_TOKENS} at most, or use a new cache"
            )

    def select(self, ledger: Ledger, rows: Sequence[int]) -> None:
        """Make row `i` what row `rows[i]` was; the number of rows may change."""
        old, tail = ledger.geometry, ledger.tail
        geometry = Geometry(len(rows), old.kv_heads, old.key_dim, old.value_dim, old.dtype)
        if tail is None:
            ledger.select_window(geometry, None)
            return
        piece = tail.piece if geometry == old else self._piece(geometry, tail.capacity)
        self._state(piece, writes=True)
        target = Extent(piece, geometry, tail.capacity, tail.start)
        copy_rows(tail, target, torch.tensor(rows, device=tail.whole.keys.device))
        ledger.select_window(geometry, target)
        self._note_written(piece)

    def copy(self, source: Ledger, target: Ledger) -> None:
        """Let an empty ledger of the same geometry hold what another one does."""
        assert source.tail is not None
        source.tail.piece.wait_ready(self._device)
        tail = self._begin(target)
        target.restart_tail(source.tail.start)
        self._state(source.tail.piece, writes=False)
        self._append(target, tail, source.tail.tile(source.tail.start, source.tail.end).kv)
        self._note_written(tail.piece)

    def saved(self, ledger: Ledger) -> tuple[int, KV]:
        """Return copies on the CPU of what must be kept of a window, and where it begins.

        These are the sinks, what the next query sees, and what can be taken back.

        Returns:
            The start for `restore`, and the sinks with the other tokens right behind them.
        """
        tail = ledger.tail
        assert tail is not None
        tail.piece.wait_ready(self._device)
        self._state(tail.piece, writes=False)
        sinks = tail.tile(tail.start, tail.start + ledger.sink_tokens)
        others = tail.tile(sinks.start + sinks.tokens, tail.end)
        if ledger.tokens >= ledger.track.sink_tokens:  # else they are sinks, and all are kept
            others = others.newest(ledger.past_tokens + SPARE_TOKENS)
        parts = zip(sinks.kv, others.kv, strict=True)
        return others.start - sinks.tokens, KV(*(torch.cat(part, dim=2).cpu() for part in parts))

    def restore(self, ledger: Ledger, start: int, kv: KV) -> None:
        """Let an empty ledger hold what `saved` returned, whatever its page's size was."""
        tail = self._begin(ledger)
        ledger.restart_tail(start)
        self._append(ledger, tail, kv)
        self._note_written(tail.piece)

    def park(self, ledger: Ledger) -> None:
        """Move a window to memory of the CPU, which nobody writes to, until `wake`."""
        if ledger.tail is not None and not self._device.tiles_are_views:
            ledger.tail = _on_host(ledger.geometry, *self.saved(ledger))

    def wake(self, ledger: Ledger) -> None:
        """Bring a parked window back."""
        tail = ledger.tail
        if tail is not None and not self._device.tiles_are_views:
            ledger.tail = None
            self.restore(ledger, tail.start, tail.tile(tail.start, tail.end).kv)

    def park_copy(self, source: Ledger, target: Ledger, *, parked: bool) -> None:
        """Let an empty ledger hold a window that another one does, as a parked one.

        Args:
            source: of the same geometry.
            target: the empty one.
            parked: whether the source is parked, too.
        """
        if self._device.tiles_are_views or source.tail is None:
            self.copy(source, target)
        elif parked:
            target.tail = copy.copy(source.tail)
        else:
            target.tail = _on_host(source.geometry, *self.saved(source))

    def _state(self, piece: Piece, *, writes: bool) -> None:
        """State what compute does with a window, where that is checked."""
        if self._device.checks_accesses:
            compute = self._device.compute
            (compute.writes if writes else compute.reads)(piece.memory, "a window's tokens")

    def _note_written(self, piece: Piece) -> None:
        """Have others wait for a window: compute may be another thread's stream by then."""
        if not self._device.tiles_are_views:
            piece.ready = self._device.compute.record()

    def _piece(self, geometry: Geometry, tokens: int) -> Piece:
        return Piece(self._device.device_empty(geometry.num_bytes(tokens)))

    def _begin(self, ledger: Ledger) -> Extent:
        assert ledger.track.window_tokens is not None
        capacity = window_capacity(ledger.track.window_tokens, self._page_tokens)
        capacity += ledger.track.sink_tokens
        return ledger.begin_tail(self._piece(ledger.geometry, capacity), capacity)

    def _restart(self, ledger: Ledger, tail: Extent, tile: Tile) -> None:
        """Have the tail begin with the newest of some tokens: those that are needed."""
        firm_tokens = ledger.firm_tokens
        drafted = 0 if firm_tokens is None else tail.end - firm_tokens
        drafted = min(drafted, self._page_tokens - 1)  # or there would be no room for the next
        newest = tile.newest(ledger.past_tokens + SPARE_TOKENS + drafted)
        kept = newest.kv
        if tile.piece is tail.piece:  # its new place may overlap the old one
            kept = KV(kept.keys.clone(), kept.values.clone())
        ledger.half_done = True
        ledger.restart_tail(newest.start)
        self._append(ledger, tail, kept)
        ledger.half_done = False

    def _append(self, ledger: Ledger, tail: Extent, new: KV) -> None:
        self._state(tail.piece, writes=True)
        ledger.extend(tail, new.tokens).kv.copy_(new)


def _on_host(geometry: Geometry, start: int, kv: KV) -> Extent:
    """Return tokens in plain memory of the CPU."""
    memory = torch.empty(geometry.num_bytes(kv.tokens), dtype=torch.uint8, device="cpu")
    extent = Extent(Piece(memory), geometry, kv.tokens, start)
    extent.whole.copy_(kv)
    extent.tokens = kv.tokens
    return extent
