"""The attention of one chunk: group of heads by group of heads, part by part."""

import contextlib
from collections.abc import Iterable, Iterator
from typing import Protocol

import torch
from torch.profiler import record_function

from headinfer.attend.masks import band_works
from headinfer.attend.work import Total, Work, tile_in_hand
from headinfer.engine.chunk import Chunk
from headinfer.kv.extent import Tile
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
    chunk, parts = tokens.chunk, step.parts
    # What is new is in new memory, and can be the result as it is, if no answer is to come.
    lone = step.write and step.groups == 1 and len(parts) == 1 and isinstance(parts[0], Own)
    lone = lone and chunk.result is None and chunk.sinks is None
    with attention_mark():
        if lone and chunk.padding is None:
            chunk.result = chunk.kernels.attend_square(chunk.queries, chunk.new, chunk.scale)
            if chunk.result is not None:
                return
        _attend_groups(tokens, step, lone=lone)


def _attend_groups(tokens: Tokens, step: Attend, *, lone: bool) -> None:
    chunk, parts = tokens.chunk, step.parts
    kernels, kv_heads, whole = chunk.kernels, chunk.new.keys.shape[1], step.groups == 1
    near = [tokens.near(part.where) if isinstance(part, Near) else None for part in parts]
    for first in range(0, kv_heads, step.heads):
        # A view of all heads would be the same, and takes time.
        heads = ALL_HEADS if whole else slice(first, min(first + step.heads, kv_heads))
        query = chunk.query if whole else chunk.query[:, heads]
        total = kernels.begin(query, scale=chunk.scale)
        for part, kept in zip(parts, near, strict=True):
            works: Iterable[Work]
            if kept is not None:
                works = (_past_work(chunk, query, kept._replace(heads=heads), total),)
            elif isinstance(part, Own):
                works = _own_works(chunk, query, heads, total)
            elif isinstance(part, Tiles):
                works = (_past_work(chunk, query, tile, total) for tile in tokens.tiles(heads))
            else:
                window = tokens.near(Where.WINDOW)
                if _attended_without_masks(chunk, window, total):
                    continue
                works = _window_works(chunk, window, total)
            for work in works:
                kernels.pick(work).attend(work)
        if not step.write:
            chunk.waiting.append((heads, total))
        elif not (lone and chunk.finish_alone(total)):
            chunk.finish(heads, total)


def _past_work(chunk: Chunk, query: torch.Tensor, tile: Tile, total: Total) -> Work:
    """Return what attends some heads of a chunk to a tile before it."""
    mask = None
    if chunk.padding is not None:
        mask = chunk.padding_of(tile.start, tile.start + tile.tokens)
    return Work(query, (tile,), chunk.scale, total, mask=mask)


def _own_works(chunk: Chunk, query: torch.Tensor, heads: slice, total: Total) -> Iterable[Work]:
    """Return what attends some heads of a chunk to itself."""
    past, tile, padding = chunk.past_tokens, tile_in_hand(chunk.new, heads), None
    if chunk.padding is not None:
        padding = chunk.padding_of(past, past + chunk.tokens)
    if padding is None:
        return (Work(query, (tile,), chunk.scale, total, causal=True, past_tokens=past),)
    return band_works(
        query, tile, scale=chunk.scale, into=total, window_tokens=None, padding=padding
    )


def _attended_without_masks(chunk: Chunk, tile: Tile, total: Total) -> bool:
    """Attend a chunk to a window at once, where the device has a kernel for it."""
    if chunk.window_tokens is None or chunk.tokens == 1 or chunk.padding is not None:
        return False
    band = chunk.kernels.find_band()
    if band is None:
        return False
    total.add(band(chunk.query, tile.kv, chunk.scale, chunk.window_tokens))
    return True


def _window_works(chunk: Chunk, tile: Tile, total: Total) -> Iterator[Work]:
    """Return what attends a chunk to a window that ends with it."""
    if chunk.tokens == 1:
        tile = tile.newest(chunk.window_tokens or tile.tokens)
    return band_works(
        chunk.query,
        tile,
        scale=chunk.scale,
        into=total,
        window_tokens=chunk.window_tokens,
        padding=chunk.padding_of(tile.start, tile.start + tile.tokens),
    )


class TokensInHand:
    """A source of tokens that somebody else keeps on the device.

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
    kv_heads, tile = kv.keys.shape[1], tile_in_hand(kv)
    if chunk.window_tokens is not None:
        step = Attend(kv_heads, 1, (Band(),))
    elif chunk.tokens == 1:  # a single token sees its own key as it does those before it
        step = Attend(kv_heads, 1, (Near(Where.WINDOW),))
    else:
        chunk.past_tokens = kv.tokens - chunk.tokens
        tile = tile._replace(tokens=chunk.past_tokens)
        past = (Near(Where.WINDOW),) if chunk.past_tokens else ()
        step = Attend(kv_heads, 1, (Own(), *past))
    attend_groups(TokensInHand(chunk, tile), step)
