"""Layers that see a window of recent tokens: all of them stay on the device, and nothing is copied.

A window's tokens lie in one piece of memory, the new ones behind the old, so that one call attends
them; what no query will see any more is dropped when the piece is full. Compute alone touches them.
"""

from collections.abc import Sequence

import torch

from headinfer.device.base import Device
from headinfer.errors import CacheStateError
from headinfer.kv.extent import Extent, Piece, Tile
from headinfer.kv.ledger import Ledger, copy_rows
from headinfer.kv.pair import KV, Geometry


class WindowKeeper:
    """Takes the new tokens of layers with a window into their ledgers.

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
            All in one piece, valid on compute until the next tokens are taken.
        """
        tail = ledger.tail or self._begin(ledger)
        low = max(tail.end - ledger.past_tokens, tail.start)
        if new.tokens <= self._page_tokens:
            if tail.limit - tail.end < new.tokens:
                tail = self._move(ledger, tail)
            self._append(ledger, tail, new)
            self._state(tail.piece, writes=False)
            return tail.tile(low, tail.end)
        self._state(tail.piece, writes=False)
        past = tail.tile(low, tail.end).kv
        both = KV(*(torch.cat(parts, dim=2) for parts in zip(past, new, strict=True)))
        self._put_newest(ledger, tail, low, both)
        return Tile(low, both.tokens, Piece(both.keys), both)

    def crop(self, ledger: Ledger, tokens: int) -> None:
        """Keep the first `tokens` tokens.

        Raises:
            CacheStateError: the tokens that a query would then see were dropped.
        """
        if tokens < ledger.tokens and not ledger.can_crop(tokens):
            raise CacheStateError(
                f"{ledger.tokens - tokens} tokens cannot be taken back: a layer with a window of "
                f"{ledger.window_tokens} tokens has dropped those before them; call "
                "activate_past_recording() on the cache before the tokens come"
            )
        ledger.crop(tokens)

    def select(self, ledger: Ledger, rows: Sequence[int]) -> None:
        """Make row `i` what row `rows[i]` was; the number of rows may change."""
        old, tail = ledger.geometry, ledger.tail
        geometry = Geometry(len(rows), old.kv_heads, old.key_dim, old.value_dim, old.dtype)
        if tail is None:
            ledger.geometry = geometry
            return
        piece = tail.piece if geometry == old else self._piece(geometry, tail.capacity)
        self._state(piece, writes=True)
        target = Extent(piece, geometry, tail.capacity, tail.start)
        copy_rows(tail, target, torch.tensor(rows, device=tail.whole.keys.device))
        ledger.geometry = geometry
        ledger.replace_tail(target, tail.tokens)

    def _state(self, piece: Piece, *, writes: bool) -> None:
        """State what compute does with a window, where that is checked."""
        if self._device.checks_accesses:
            compute = self._device.compute
            (compute.writes if writes else compute.reads)(piece.memory, "a window's tokens")

    def _piece(self, geometry: Geometry, tokens: int) -> Piece:
        return Piece(self._device.device_empty(geometry.num_bytes(tokens)))

    def _capacity(self, ledger: Ledger, tokens: int) -> int:
        """Return the tokens that a piece has memory for which is to hold `tokens` now."""
        return max(tokens, ledger.past_tokens) + self._page_tokens

    def _begin(self, ledger: Ledger) -> Extent:
        capacity = self._capacity(ledger, 0)
        return ledger.begin_tail(self._piece(ledger.geometry, capacity), capacity)

    def _move(self, ledger: Ledger, tail: Extent) -> Extent:
        """Bring what must be kept to the front of the piece, or of one that fits it better."""
        low = max(ledger.first_needed(tail.end), tail.start)
        kept = tail.tile(low, tail.end).kv
        # It may overlap its new place.
        return self._put_newest(ledger, tail, low, KV(kept.keys.clone(), kept.values.clone()))

    def _put_newest(self, ledger: Ledger, tail: Extent, start: int, newest: KV) -> Extent:
        """Have the layer hold those of the newest tokens, the first at `start`, that it needs."""
        end = start + newest.tokens
        low = max(ledger.first_needed(end), start)
        capacity = self._capacity(ledger, end - low)
        piece = tail.piece
        if capacity != tail.capacity:
            piece = self._piece(ledger.geometry, capacity)
        extent = Extent(piece, ledger.geometry, capacity, low)
        ledger.replace_tail(extent, 0)
        self._append(ledger, extent, newest.cut(slice(low - start, newest.tokens)))
        return extent

    def _append(self, ledger: Ledger, tail: Extent, new: KV) -> None:
        self._state(tail.piece, writes=True)
        place = ledger.extend(tail, new.tokens).kv
        place.keys.copy_(new.keys)
        place.values.copy_(new.values)
