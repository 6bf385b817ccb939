"""The attention of one chunk: group of heads by group of heads, part by part."""

import contextlib
from collections.abc import Iterator
from typing import Protocol

import torch
from torch.profiler import record_function

from headinfer.attend.masks import attend_band, attend_square
from headinfer.attend.partial import TileAttention
from headinfer.engine.chunk import Chunk
from headinfer.kv.extent import Piece, Tile
from headinfer.kv.pair import ALL_HEADS, KV
from headinfer.schedule.steps import Attend, Band, Near, Own, Tiles, Where

ATTENTION_MARK = "headinfer: attention"
"""What a profiler shows around a layer's attention on the device."""

_UNMARKED = contextlib.nullcontext()


def attention_mark() -> contextlib.AbstractContextManager[object]:
    """Mark what is enqueued within as attention, if a profiler looks on: a mark takes 12 us."""
    if torch._C._autograd._profiler_enabled():
        return record_function(ATTENTION_MARK)
    return _UNMARKED


class Tokens(Protocol):
    """A chunk, and where it finds what it attends.

    Attributes:
        chunk: the new tokens.
    """

    chunk: Chunk

    def near(self, where: Where) -> Tile:
        """Return all tokens of a place on the device, valid on compute; a tile of all heads.

        With a window these are the tokens that the new ones see, and the new ones.
        """

    def tiles(self, heads: slice) -> Iterator[Tile]:
        """Yield the tiles of some heads, each valid on compute until the next is asked for."""


def attend_groups(tokens: Tokens, step: Attend) -> None:
    """Attend a chunk as a step says; write the result, or leave it in `chunk.waiting`.

    Args:
        tokens: the chunk, and what it attends.
        step: which parts, by which groups of heads.
    """
    chunk = tokens.chunk
    kv_heads, whole = chunk.new.keys.shape[1], step.groups == 1
    near = {part: tokens.near(part.where) for part in step.parts if isinstance(part, Near)}
    with attention_mark():
        for first in range(0, kv_heads, step.heads):
            # A view of all heads would be the same, and takes time.
            heads = ALL_HEADS if whole else slice(first, min(first + step.heads, kv_heads))
            query = chunk.query if whole else chunk.query[:, heads]
            total = chunk.kernel.begin(query, scale=chunk.scale)
            for part in step.parts:
                if isinstance(part, Near):
                    tile = near[part]
                    if tile.tokens:
                        _attend_tile(total, chunk, tile if whole else tile._replace(heads=heads))
                elif isinstance(part, Tiles):
                    for tile in tokens.tiles(heads):
                        _attend_tile(total, chunk, tile)
                elif isinstance(part, Own):
                    _attend_own(total, chunk, query, heads)
                else:
                    _attend_band(total, chunk, tokens.near(Where.WINDOW))
            if step.write:
                chunk.finish(heads, total)
            else:
                chunk.waiting.append((heads, total))


def _attend_tile(total: TileAttention, chunk: Chunk, tile: Tile) -> None:
    mask = None
    if chunk.padding is not None:
        mask = chunk.padding_of(tile.start, tile.start + tile.tokens)
    keys, values = tile.kv
    total.attend(keys, values, mask=mask)


def _attend_own(total: TileAttention, chunk: Chunk, query: torch.Tensor, heads: slice) -> None:
    padding = chunk.padding_of(chunk.past_tokens, chunk.past_tokens + chunk.tokens)
    keys, values = chunk.new.keys[:, heads], chunk.new.values[:, heads]
    total.add(attend_square(chunk.kernel, query, keys, values, scale=chunk.scale, padding=padding))


def _attend_band(total: TileAttention, chunk: Chunk, tile: Tile) -> None:
    if chunk.tokens == 1:
        _attend_tile(total, chunk, tile.newest(chunk.window_tokens or tile.tokens))
        return
    partial = attend_band(
        chunk.kernel,
        chunk.query,
        *tile.kv,
        scale=chunk.scale,
        window_tokens=chunk.window_tokens,
        padding=chunk.padding_of(tile.start, tile.start + tile.tokens),
    )
    total.add(partial)


class TokensInHand:
    """Tokens that somebody else keeps on the device.

    Args:
        chunk: attends them.
        tile: all that are attended, of all heads.
    """

    def __init__(self, chunk: Chunk, tile: Tile) -> None:
        self.chunk = chunk
        self._tile = tile

    def near(self, where: Where) -> Tile:
        """Return the tokens."""
        return self._tile

    def tiles(self, heads: slice) -> Iterator[Tile]:
        """Yield nothing: nothing is streamed."""
        return iter(())


def attend_in_hand(chunk: Chunk, kv: KV) -> None:
    """Attend a chunk to tokens that somebody else keeps on the device, and write the result.

    Args:
        chunk: the new tokens.
        kv: past tokens, and the chunk's own behind them; all that its padding tells of.
    """
    kv_heads, tile = kv.keys.shape[1], Tile(0, kv.tokens, Piece(kv.keys), kv)
    if chunk.window_tokens is not None:
        step = Attend(kv_heads, 1, (Band(),))
    elif chunk.tokens == 1:  # a single token sees its own key as it does those before it
        step = Attend(kv_heads, 1, (Near(Where.WINDOW),))
    else:
        chunk.past_tokens = kv.tokens - chunk.tokens
        tile = tile._replace(tokens=chunk.past_tokens)
        step = Attend(kv_heads, 1, (Own(), Near(Where.WINDOW)))
    attend_groups(TokensInHand(chunk, tile), step)
