"""What a kernel is asked, and where its results go: one argument object for all of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from headinfer.attend.fused_call import FusedCall
from headinfer.attend.partial import Partial
from headinfer.kv.extent import Piece, Tile
from headinfer.kv.pair import ALL_HEADS, KV


class Total(Protocol):
    """A place that collects partials of the same queries; made by `Kernels.begin`.

    Attributes:
        folded: the queries with the group folded into them, contiguous, `[batch, kv_heads, group *
            q_len, key_dim]`; kept by the first kernel that needs them so. None before that.
    """

    folded: torch.Tensor | None

    def add(self, partial: Partial) -> None:
        """Merge a partial, which must stay as it is until the end."""

    def add_sinks(self, sinks: torch.Tensor) -> None:
        """Merge attention sinks `[kv_heads, group]`, once all partials are."""

    def alone(self, dtype: torch.dtype) -> torch.Tensor | None:
        """Return the output of the one partial that was added, as it is.

        Returns:
            `[batch, q_len, kv_heads, group, value_dim]`, contiguous; None where others were merged,
            or where its layout or dtype is another.
        """

    def write(self, out: torch.Tensor) -> None:
        """Write the result to `out[batch, q_len, kv_heads, group, value_dim]`, in its dtype."""


@dataclass(slots=True)
class Work:
    """A request to a kernel: queries, and the tiles they are attended to.

    Attributes:
        query: `[batch, kv_heads, group, q_len, key_dim]`, any strides with a unit last one;
            unchanged until the total is written.
        tiles: with as many heads as the queries; never expanded over the group.
        scale: factor of the scores.
        into: collects partials of these very queries; None until there is such a place.
        causal: query `i` sees key `j` only for `j <= i`; the one tile is the queries' own tokens.
        mask: bool `[batch or 1, q_len or 1, kv_len]` of the one tile, True where visible; not with
            `causal`. None where all is.
        past_tokens: with `causal`, tokens before the queries, which other works attend. They tell
            how long the prompt is by now.
    """

    query: torch.Tensor
    tiles: Sequence[Tile]
    scale: float
    into: Total | None = None
    causal: bool = False
    mask: torch.Tensor | None = None
    past_tokens: int = 0


@dataclass(slots=True)
class TokenWork:
    """A request to attend one new token of each row, and to keep it; see `Kernels.decode`.

    Attributes:
        query: `[batch, kv_heads, group, 1, key_dim]`, any strides with a unit last one.
        new: the token's keys and values, `[batch, kv_heads, 1, dim]`.
        tile: all that the token sees; the last place is the token's own, still to be written.
        scale: factor of the scores.
        out: where the result goes, `[batch, 1, kv_heads, group, value_dim]`.
        sinks: scores `[kv_heads, group]` of attention sinks, or None.
        sink_tokens: tokens that it sees besides, at the beginning of the tile's memory; with
            `place`, the most there can be.
        place: `[3]` of int64 where the queries are: the tile's `first` and `tokens`, and
            `sink_tokens`, which are read from there when the kernel runs. So a captured launch
            serves the tokens that follow. None where those of the work hold.
        counters: zeros `[batch * kv_heads]` of int32 for kernels to count with, which are zeros
            again afterwards; with `place`, because a capture uses them wherever it is replayed.
    """

    query: torch.Tensor
    new: KV
    tile: Tile
    scale: float
    out: torch.Tensor
    sinks: torch.Tensor | None = None
    sink_tokens: int = 0
    place: torch.Tensor | None = None
    counters: torch.Tensor | None = None


class Kernel(Protocol):
    """A kernel that computes partials.

    It keeps nothing of a work that would change another, and may be shared.

    Attributes:
        name: what users know it by; empty where it serves nothing.
    """

    name: str

    def serves(self, work: Work) -> bool:
        """Whether it can attend a work, and is worth it."""

    def attend(self, work: Work) -> None:
        """Attend to each tile, and add the partials to `work.into`.

        All is enqueued on the stream that is current. A tile's memory may be overwritten by what is
        ordered after that.
        """

    def square(self, work: Work) -> FusedCall | None:
        """Return the operator that attends a causal work which it serves, as one call.

        It takes fewer heads of keys than of queries, and its output has the queries' dtype. None
        where there is no such operator. The answer depends on the shape and dtype of the queries
        alone.
        """


def by_kv_head(queries: torch.Tensor, new: KV) -> torch.Tensor:
    """Return `[batch, query_heads, q_len, dim]` as `[batch, kv_heads, group, q_len, dim]`."""
    (batch, query_heads, q_len, dim), kv_heads = queries.shape, new.keys.shape[1]
    return queries.view(batch, kv_heads, query_heads // kv_heads, q_len, dim)


def tile_in_hand(kv: KV, heads: slice = ALL_HEADS) -> Tile:
    """Return all tokens of some heads of keys and values that are in no ledger."""
    return Tile(0, kv.keys.shape[2], Piece(kv.keys), kv, 0, heads)
