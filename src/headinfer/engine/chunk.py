"""New tokens of one layer on their way through its attention, and the partials they get."""

import contextlib
import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch.profiler import record_function

from headinfer.attend.masks import Padding, attend_queries, band_works, padding_of
from headinfer.attend.table import Kernels
from headinfer.attend.work import Total, Work, tile_in_hand
from headinfer.kv.extent import Tile
from headinfer.kv.pair import KV

ATTENTION_MARK = "headinfer: attention"
"""What a profiler shows around a layer's attention on the device."""

_UNMARKED = contextlib.nullcontext()


def attention_mark() -> contextlib.AbstractContextManager[object]:
    """Mark what is enqueued within as attention, if a profiler looks on: a mark takes 12 us."""
    if torch._C._autograd._profiler_enabled():
        return record_function(ATTENTION_MARK)
    return _UNMARKED


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """One layer's new tokens and how they attend.

    Attributes:
        query: `[batch, kv_heads, group, q_len, key_dim]` on the device.
        new: the new tokens' keys and values `[batch, kv_heads, q_len, dim]`.
        out: where the result goes, `[batch, q_len, kv_heads, group, value_dim]`.
        kernels: what computes partials on the device.
        scale: factor of the scores.
        padding: of the tokens from `padding_start` on, past and new; None when there is none.
        sinks: scores `[kv_heads, group]` of attention sinks, or None.
        padding_start: position of the first token that `padding` tells of.
    """

    query: torch.Tensor
    new: KV
    out: torch.Tensor
    kernels: Kernels
    scale: float
    padding: Padding | None
    sinks: torch.Tensor | None
    padding_start: int = 0

    @property
    def tokens(self) -> int:
        """Number of new tokens."""
        return self.new.tokens

    def part(self, tokens: slice) -> "Chunk":
        """Return some of the tokens as a chunk of their own."""
        return dataclasses.replace(
            self,
            query=self.query[:, :, :, tokens],
            new=self.new.cut(tokens),
            out=self.out[:, tokens],
        )

    def attend(
        self, heads: slice, near: Iterable[Tile], tiles: Iterable[Tile], past_tokens: int
    ) -> Total:
        """Attend some heads to the chunk itself and to past tokens on the device.

        Args:
            heads: which KV heads.
            near: past tokens with all heads.
            tiles: past tokens with these heads alone; each valid until the next is asked for.
            past_tokens: how many tokens came before the chunk.
        """
        with attention_mark():
            # A view of all heads would be the same, and takes time.
            whole = heads.stop - heads.start == self.new.keys.shape[1]
            query = self.query if whole else self.query[:, heads]
            total = self.kernels.begin(query, scale=self.scale)
            if self.tokens > 1:
                own_padding = self._padding_of(past_tokens, past_tokens + self.tokens)
                own = tile_in_hand(self.new)._replace(heads=heads)
                works = band_works(
                    query, own, scale=self.scale, window_tokens=None, padding=own_padding
                )
                total.add(attend_queries(self.kernels, works))
            for tile in near:
                self._attend_past(query, total, tile if whole else tile._replace(heads=heads))
            for tile in tiles:
                self._attend_past(query, total, tile)
            return total

    def _attend_past(self, query: torch.Tensor, total: Total, tile: Tile) -> None:
        mask = None
        if self.padding is not None:
            mask = self._padding_of(tile.start, tile.start + tile.tokens)
        work = Work(query, (tile,), self.scale, total, mask=mask)
        self.kernels.pick(work).attend(work)

    def _padding_of(self, start: int, end: int) -> torch.Tensor | None:
        return padding_of(self.padding, start - self.padding_start, end - self.padding_start)

    def attend_window(self, tile: Tile, window_tokens: int | None) -> None:
        """Attend all heads to tokens that end with the chunk's own, and write the result.

        Args:
            tile: past and new tokens, in one piece.
            window_tokens: tokens that each query sees, its own included; None for all.
        """
        with attention_mark():
            total = self.kernels.begin(self.query, scale=self.scale)
            end = tile.start + tile.tokens
            if self.tokens == 1:
                self._attend_past(self.query, total, tile.newest(window_tokens or tile.tokens))
            else:
                works = band_works(
                    self.query,
                    tile,
                    scale=self.scale,
                    window_tokens=window_tokens,
                    padding=self._padding_of(tile.start, end),
                )
                total.add(attend_queries(self.kernels, works))
        self.finish(slice(0, self.new.keys.shape[1]), total)

    def finish(self, heads: slice, total: Total) -> None:
        """Put what was merged for some heads into `out`."""
        if self.sinks is not None:
            total.add_sinks(self.sinks[heads])
        total.write(self.out[:, :, heads])

    def attend_in_hand(self, kv: KV, window_tokens: int | None) -> None:
        """Attend to tokens that somebody else keeps on the device, and write the result.

        Args:
            kv: past tokens, and the chunk's own behind them; all that `padding` tells of.
            window_tokens: tokens that each query sees, its own included; None for all.
        """
        tile = tile_in_hand(kv)
        if window_tokens is not None:
            self.attend_window(tile, window_tokens)
            return
        past_tokens = kv.tokens - self.tokens
        if self.tokens > 1:  # a single token sees its own key as it does those before it
            tile = tile._replace(tokens=past_tokens)
        heads = slice(0, kv.keys.shape[1])
        self.finish(heads, self.attend(heads, [tile] if tile.tokens else [], (), past_tokens))
