"""Stretches of tokens in memory, and the tiles that are cut from them."""

import copy
from typing import NamedTuple

import torch

from headinfer.device.base import Device, Edge, Event
from headinfer.kv.pair import ALL_HEADS, KV, Geometry, carver


class Piece:
    """A piece of memory in one place, for the tokens of whichever layer it is given to.

    Work of several streams meets in it, so it knows the last of what was enqueued for it on
    streams other than compute. Who reads it waits for `ready`, who overwrites it for `free`.

    Args:
        memory: `[num_bytes]` of uint8; owned by the piece.

    Attributes:
        memory: all of it.
        ready: reached when what another stream wrote is there; None where nothing is to be
            waited for.
        free: reached when other streams have read what they were to read; None where nothing is
            to be waited for.
        holders: ledgers that hold tokens in it.
        shared_tokens: of its tokens, the first so many may be held by several; with more than one
            holder these are not written to.
    """

    __slots__ = ("free", "holders", "memory", "ready", "shared_tokens", "views")

    def __init__(self, memory: torch.Tensor) -> None:
        self.memory = memory
        self.ready: Event | None = None
        self.free: Event | None = None
        self.holders = 1
        self.shared_tokens = 0
        self.views = carver(memory)

    @property
    def shared_bytes(self) -> int:
        """A holder's part of what it would take to give each holder memory of its own."""
        return self.memory.numel() * (self.holders - 1) // self.holders

    def wait_ready(self, device: Device) -> None:
        """Hold the device's compute stream until what another stream wrote is there.

        A device without streams (the CPU) writes nothing elsewhere, so nothing is waited for.
        """
        if self.ready is not None:
            device.compute.wait(self.ready, Edge.TILE_FILLED)
            self.ready = None


class Tile(NamedTuple):
    """A rectangle of a layer's cache, some heads x some tokens: what is copied and attended.

    Nothing is viewed before it is needed, since a view takes longer than what a compiled program
    does with an address.

    Attributes:
        start: position of the first token in the layer.
        tokens: number of tokens.
        piece: the memory they lie in.
        whole: that memory as keys and values, `[batch, heads, capacity, dim]`.
        first: index of the first token in `whole`.
        heads: which heads of `whole`.
        counted: `[1]` of int64 on the device: how many of the tokens there are, the first ones,
            when a kernel runs. None where that is all.
    """

    start: int
    tokens: int
    piece: Piece
    whole: KV
    first: int = 0
    heads: slice = ALL_HEADS
    counted: torch.Tensor | None = None

    def newest(self, tokens: int) -> "Tile":
        """Return the newest tokens of the tile, at most so many."""
        left = max(self.tokens - tokens, 0)
        if not left:
            return self
        return self._replace(
            start=self.start + left, tokens=self.tokens - left, first=self.first + left
        )

    @property
    def kv(self) -> KV:
        """Keys and values `[batch, heads, tokens, dim]`, as views of the memory."""
        whole = not self.first and self.heads is ALL_HEADS
        if whole and self.tokens == self.whole.keys.shape[2]:
            return self.whole
        tokens = slice(self.first, self.first + self.tokens)
        keys, values = self.whole
        return KV(keys[:, self.heads, tokens], values[:, self.heads, tokens])


class Extent:
    """A stretch of tokens of one layer in one piece of memory.

    Only a ledger changes which tokens these are.

    Args:
        piece: the memory.
        geometry: shape of the layer.
        capacity: tokens there is memory for.
        start: position of the first token.

    Attributes:
        piece: the memory.
        start: position of the first token.
        tokens: tokens it holds.
        capacity: tokens there is memory for.
        whole: all of the memory as keys and values, `[batch, kv_heads, capacity, dim]`.
    """

    __slots__ = ("capacity", "piece", "start", "tokens", "whole")

    def __init__(self, piece: Piece, geometry: Geometry, capacity: int, start: int) -> None:
        self.piece = piece
        self.capacity = capacity
        self.start = start
        self.tokens = 0
        self.whole = piece.views(geometry, capacity, None)

    def share(self) -> "Extent":
        """Return another extent of the same tokens in the same memory, for another ledger.

        That one has no memory for more.
        """
        other, piece = copy.copy(self), self.piece
        other.capacity = self.tokens
        before = piece.shared_tokens if piece.holders > 1 else 0
        piece.shared_tokens = max(before, self.tokens)
        piece.holders += 1
        return other

    @property
    def end(self) -> int:
        """One past the last token it holds."""
        return self.start + self.tokens

    @property
    def limit(self) -> int:
        """One past the last token there is memory for."""
        return self.start + self.capacity

    def tile(self, start: int, end: int, heads: slice = ALL_HEADS) -> Tile:
        """Return the tokens from `start` to before `end`, which lie within `capacity`."""
        return Tile(start, end - start, self.piece, self.whole, start - self.start, heads)


def copy_rows(source: Extent, target: Extent, rows: torch.Tensor) -> None:
    """Make row `i` of an extent's tokens what row `rows[i]` is in another one, or was in itself.

    One head at a time, so that it takes no more memory than one head.
    """
    tokens = slice(0, source.tokens)
    for old, new in zip(source.whole, target.whole, strict=True):
        for head in range(old.shape[1]):
            new[:, head, tokens].copy_(old[:, head, tokens].index_select(0, rows))
