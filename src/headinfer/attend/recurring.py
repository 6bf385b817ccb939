"""Calls of an operator that prepares for each new shape, in few shapes that come again.

A prompt's chunks see ever more tokens, and layers with streaming heads have different numbers of
full heads. Each new number is a new shape, and so are new strides. Powers of two of the tokens, and
pairs of the heads, are shapes that come again in later chunks, layers and prompts.

Measured on an H100, cuDNN prepared 40 to 125 ms for a shape. A chunk of 8K tokens is attended to
one as long in 1.7 ms.
"""

from collections.abc import Iterator

import torch

from headinfer.attend.fused_call import FusedCall, attend_grouped, attend_split
from headinfer.attend.partial import Partial
from headinfer.attend.work import Total
from headinfer.kv.pair import ALL_HEADS, KV

_HEADS = 2
"""Heads of a call where their number is no power of two; the last of an odd number is alone."""


def cut_in_powers(tokens: int, least: int) -> Iterator[slice]:
    """Yield stretches of tokens, each a power of two and the longest first, and then the rest.

    Args:
        tokens: in all.
        least: tokens of the shortest such stretch; the rest has fewer.
    """
    first = 0
    while first < tokens:
        left = tokens - first
        power = 1 << (left.bit_length() - 1)
        stretch = power if power >= least else left
        yield slice(first, first + stretch)
        first += stretch


def attend_recurring(
    call: FusedCall, folded: torch.Tensor, kv: KV, scale: float, group: int
) -> Partial:
    """Attend some tokens, in calls of as many heads as come again.

    Args:
        call: the operator.
        folded: queries `[batch, kv_heads, group * q_len, key_dim]`, contiguous.
        kv: keys and values `[batch, kv_heads, tokens, dim]`; their number should be one that comes
            again.
        scale: factor of the scores.
        group: query heads that share a KV head.
    """
    return _joined(
        [
            attend_split(call, _alone(folded, heads), *_both_alone(kv, heads), scale, 1, group)
            for heads in _recurring_heads(folded)
        ]
    )


def attend_recurring_square(call: FusedCall, query: torch.Tensor, kv: KV, scale: float) -> Partial:
    """Attend new tokens to themselves by an operator with a causal mask, in such calls.

    Args:
        call: the operator.
        query: `[batch, kv_heads, group, q_len, key_dim]`, contiguous.
        kv: of the same tokens.
        scale: factor of the scores.
    """
    return _joined(
        [
            attend_grouped(call, _alone(query, heads), *_both_alone(kv, heads), scale)
            for heads in _recurring_heads(query)
        ]
    )


def folded_queries(query: torch.Tensor, into: Total) -> torch.Tensor:
    """Return queries contiguous and with the group folded into them, kept in `into`."""
    if into.folded is None:
        into.folded = query.contiguous().flatten(2, 3)
    return into.folded


def _recurring_heads(query: torch.Tensor) -> list[slice]:
    """Return the heads of each call."""
    kv_heads = query.shape[1]
    if kv_heads.bit_count() == 1:
        return [ALL_HEADS]
    return [slice(first, min(first + _HEADS, kv_heads)) for first in range(0, kv_heads, _HEADS)]


def _both_alone(kv: KV, heads: slice) -> KV:
    return KV(_alone(kv.keys, heads), _alone(kv.values, heads))


def _alone(tensor: torch.Tensor, heads: slice) -> torch.Tensor:
    """Return some heads, with strides that do not tell of the others where there is one row.

    So they are the strides of a tensor with these heads alone.
    """
    if heads is ALL_HEADS or tensor.shape[0] > 1:
        return tensor[:, heads]
    return tensor[0, heads].unsqueeze(0)


def _joined(partials: list[Partial]) -> Partial:
    """Join the partials of consecutive heads; a lone one is not copied."""
    if len(partials) == 1:
        return partials[0]
    out = torch.cat([partial.out for partial in partials], dim=1)
    return Partial(out, torch.cat([partial.lse for partial in partials], dim=1))
