"""New tokens of one layer on their way through its attention, and the partials they get."""

import contextlib
import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch.profiler import record_function

from headinfer.attend.masks import Padding, attend_square, padding_of
from headinfer.attend.partial import Kernel, TileAttention
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
        kernel: what computes partials on the device.
        scale: factor of the scores.
        padding: of all tokens, past and new; None when there is none.
        sinks: scores `[kv_heads, group]` of attention sinks, or None.
    """

    query: torch.Tensor
    new: KV
    out: torch.Tensor
    kernel: Kernel
    scale: float
    padding: Padding | None
    sinks: torch.Tensor | None

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
    ) -> TileAttention:
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
            total = self.kernel.begin(query, scale=self.scale)
            if self.tokens > 1:
                own_padding = padding_of(self.padding, past_tokens, past_tokens + self.tokens)
                total.add(
                    attend_square(
                        self.kernel,
                        query,
                        self.new.keys[:, heads],
                        self.new.values[:, heads],
                        scale=self.scale,
                        padding=own_padding,
                    )
                )
            for tile in near:
                self._attend_past(total, tile if whole else tile._replace(heads=heads))
            for tile in tiles:
                self._attend_past(total, tile)
            return total

    def _attend_past(self, total: TileAttention, tile: Tile) -> None:
        mask = padding_of(self.padding, tile.start, tile.start + tile.tokens)
        total.attend(*tile.kv, mask=mask)

    def finish(self, heads: slice, total: TileAttention) -> None:
        """Put what was merged for some heads into `out`."""
        if self.sinks is not None:
            total.add_sinks(self.sinks[heads])
        total.write(self.out[:, :, heads])
