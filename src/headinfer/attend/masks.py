"""What queries may see beyond plain causality: padding, and a sliding window."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from headinfer.attend.partial import Accumulator, join_queries
from headinfer.attend.work import Total, Work
from headinfer.kv.extent import Tile

_QUERY_BLOCK = 512
"""Queries masked at once: with a band of width w a block reads `512 + w` keys for `512` queries."""


@dataclass(frozen=True, slots=True)
class Padding:
    """A mask of padding: it says which tokens of each row are padding.

    Attributes:
        valid: bool `[batch, kv_len]`, False for padding, on the device of the keys.
        padded_tokens: tokens after which no row has padding, so that later tiles need no mask.
    """

    valid: torch.Tensor
    padded_tokens: int

    @classmethod
    def of(cls, valid: torch.Tensor) -> "Padding | None":
        """Return the padding of a 2-D mask, None when there is none; blocks until it is known."""
        columns = (~valid).any(dim=0).nonzero()
        return cls(valid, int(columns[-1]) + 1) if columns.numel() else None

    def of_tokens(self, start: int, end: int) -> torch.Tensor | None:
        """Return the mask `[batch, 1, end - start]` of some tokens, None when all are valid."""
        return None if start >= self.padded_tokens else self.valid[:, None, start:end]


def band_works(
    query: torch.Tensor,
    tile: Tile,
    *,
    scale: float,
    into: Total,
    window_tokens: int | None,
    padding: torch.Tensor | None,
) -> Iterator[Work]:
    """Yield works that attend each query to keys up to its own, and to no more than a window's.

    Each must be attended before the next is asked for, and what they give is joined at the end.
    They are made one by one: the masks of all would take more memory than the results.

    Args:
        query: `[batch, kv_heads, group, q_len, key_dim]`; the last query's own key is the last key.
        tile: at least the queries' own tokens.
        scale: factor of the scores.
        into: collects what all of them give.
        window_tokens: keys a query sees, its own included; None for all.
        padding: mask `[batch, 1, kv_len]` of the tile, or None.
    """
    q_len, kv_len = query.shape[3], tile.tokens
    past = kv_len - q_len
    if q_len == 1 and (window_tokens is None or kv_len <= window_tokens):
        yield Work(query, [tile], scale, into, mask=padding)
        return
    if not past and window_tokens is None and padding is None:
        yield Work(query, [tile], scale, into, causal=True)
        return
    parts = []
    for first in range(0, q_len, _QUERY_BLOCK):
        last = min(first + _QUERY_BLOCK, q_len)
        low = 0 if window_tokens is None else max(past + first - window_tokens + 1, 0)
        high = past + last
        own = torch.arange(past + first, high, device=query.device)[:, None]
        columns = torch.arange(low, high, device=query.device)[None, :]
        visible = columns <= own
        if window_tokens is not None:
            visible &= columns > own - window_tokens
        visible = visible[None]
        if padding is not None:
            visible = visible & padding[:, :, low:high]
        seen = tile._replace(start=tile.start + low, first=tile.first + low, tokens=high - low)
        parts.append(Accumulator())
        yield Work(query[:, :, :, first:last], [seen], scale, parts[-1], mask=visible)
    into.add(join_queries([part.result() for part in parts]))
