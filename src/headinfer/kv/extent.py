"""Stretches of tokens in memory, and the tiles that are cut from them."""

import copy
from collections.abc import Iterable
from typing import NamedTuple

import torch

from headinfer.device.base import Device, Edge, Event
from headinfer.disk.region import Region
from headinfer.kv.pair import ALL_HEADS, KV, Geometry
from headinfer.plan.format import Format

_KEPT_VIEWS = 8
"""Views that a piece keeps: of whole tiles or pages, and of a layer's last tile, which grows."""


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
        raw: memory that packed pages in it refer to; kept as long as the piece.
        region: where its bytes lie on the disk; None where they lie in `memory`.
    """

    __slots__ = ("_views", "free", "holders", "memory", "raw", "ready", "region", "shared_tokens")

    def __init__(self, memory: torch.Tensor, region: Region | None = None) -> None:
        self.memory = memory
        self.region = region
        self.ready: Event | None = None
        self.free: Event | None = None
        self.holders = 1
        self.shared_tokens = 0
        self.raw: tuple[torch.Tensor, ...] = ()
        self._views: dict[tuple[Geometry, int, int | None], KV] = {}

    def views(self, geometry: Geometry, tokens: int, heads: int | None) -> KV:
        """Return `Geometry.carve` of the memory, which remembers the views it made last.

        Making them takes longer than all else that a small tile or a new token needs.
        """
        key, made = (geometry, tokens, heads), self._views
        views = made.get(key) if made else None  # a geometry's hash takes as long as a view
        if views is None:
            if len(made) == _KEPT_VIEWS:
                del made[next(iter(made))]
            views = made[key] = geometry.carve(self.memory, tokens, heads=heads)
        return views

    def refer_to(self, raw: Iterable[torch.Tensor]) -> None:
        """Keep memory that pages in the piece refer to."""
        self.raw += tuple(each for each in raw if all(each is not kept for kept in self.raw))

    def forget(self, raw: Iterable[torch.Tensor]) -> None:
        """Let go of memory that no page in the piece refers to."""
        gone = list(raw)
        self.raw = tuple(each for each in self.raw if all(each is not old for old in gone))

    @classmethod
    def on_disk(cls, region: Region) -> "Piece":
        """Return a piece without memory: its views say where in the region tokens lie."""
        return cls(torch.empty(region.num_bytes, dtype=torch.uint8, device="meta"), region)

    @property
    def host_bytes(self) -> int:
        """Bytes of memory it takes; none on the disk."""
        return self.memory.numel() if self.region is None else 0

    @property
    def shared_bytes(self) -> int:
        """A holder's part of what it would take to give each holder memory of its own."""
        return self.host_bytes * (self.holders - 1) // self.holders

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
        whole: that memory as keys and values, `[batch, heads, capacity, dim]`; packed ones are
            pages.
        first: index of the first token in `whole`, counted in tokens.
        heads: which heads of `whole`.
        counted: `[1]` of int64 on the device: how many of the tokens there are, the first ones,
            when a kernel runs. None where that is all.
        format: in which the tokens lie; kernels are given dense ones, unless they say otherwise.
    """

    start: int
    tokens: int
    piece: Piece
    whole: KV
    first: int = 0
    heads: slice = ALL_HEADS
    counted: torch.Tensor | None = None
    format: Format = Format.DENSE

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
        """Keys and values `[batch, heads, tokens, dim]`, as views of the memory.

        Packed ones are all pages that have any of the tokens.
        """
        first, end = self.first, self.first + self.tokens
        if self.format is not Format.DENSE:
            first, end = first // self.format.row_tokens, self.format.rows(end)
        if not first and self.heads is ALL_HEADS and end == self.whole.keys.shape[2]:
            return self.whole
        keys, values = self.whole
        if self.heads is not ALL_HEADS:
            keys, values = keys[:, self.heads], values[:, self.heads]
        return KV(keys.narrow(2, first, end - first), values.narrow(2, first, end - first))

    @property
    def moved_tokens(self) -> int:
        """Tokens that are copied with these: packed ones are copied by whole pages."""
        row_tokens = self.format.row_tokens
        first = self.first // row_tokens * row_tokens
        return self.format.rows(self.first - first + self.tokens) * row_tokens


class Extent:
    """A stretch of tokens of one layer in one piece of memory.

    Only a ledger changes which tokens these are.

    Args:
        piece: the memory.
        geometry: shape of the layer.
        capacity: tokens there is memory for.
        start: position of the first token.
        whole: the piece's views of so many tokens, where they were made already.

    Attributes:
        piece: the memory.
        start: position of the first token.
        tokens: tokens it holds.
        capacity: tokens there is memory for.
        whole: all of the memory as keys and values, `[batch, kv_heads, capacity, dim]`, or pages.
        format: in which the tokens lie.
    """

    __slots__ = ("capacity", "format", "piece", "start", "tokens", "whole")

    def __init__(
        self,
        piece: Piece,
        geometry: Geometry,
        capacity: int,
        start: int,
        whole: KV | None = None,
    ) -> None:
        self.piece = piece
        self.capacity = capacity
        self.start = start
        self.tokens = 0
        self.format = geometry.format
        self.whole = piece.views(geometry, capacity, None) if whole is None else whole

    def share(self, end: int) -> "Extent":
        """Return another extent of the tokens before `end` in the same memory, for another ledger.

        That one has no memory for more.
        """
        other, piece = copy.copy(self), self.piece
        other.tokens = other.capacity = min(self.tokens, end - self.start)
        before = piece.shared_tokens if piece.holders > 1 else 0
        piece.shared_tokens = max(before, other.tokens)
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

    @property
    def needed_tokens(self) -> int:
        """Tokens of the rows that it needs for what it holds."""
        return min(self.format.covering(self.tokens), self.capacity)

    def tile(self, start: int, end: int, heads: slice = ALL_HEADS) -> Tile:
        """Return the tokens from `start` to before `end`, which lie within `capacity`."""
        first = start - self.start
        return Tile(start, end - start, self.piece, self.whole, first, heads, None, self.format)


def copy_rows(source: Extent, target: Extent, rows: torch.Tensor) -> None:
    """Make row `i` of an extent's tokens what row `rows[i]` is in another one, or was in itself.

    One head at a time, so that it takes no more memory than one head.
    """
    tokens = slice(0, source.format.rows(source.tokens))
    target.piece.refer_to(source.piece.raw)
    for old, new in zip(source.whole, target.whole, strict=True):
        for head in range(old.shape[1]):
            new[:, head, tokens].copy_(old[:, head, tokens].index_select(0, rows))
