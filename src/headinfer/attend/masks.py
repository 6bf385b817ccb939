"""What queries may see beyond plain causality: padding, and a sliding window."""

from dataclasses import dataclass

import torch

from headinfer.attend.partial import Kernel, Partial

_QUERY_BLOCK = 512
"""Queries masked at once: with a band of width w a block reads `512 + w` keys for `512` queries."""


@dataclass(frozen=True, slots=True)
class Padding:
    """Which tokens of each row are padding.

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


def padding_of(padding: Padding | None, start: int, end: int) -> torch.Tensor | None:
    """Return the mask of some tokens as `Padding.of_tokens` does, None without padding."""
    return None if padding is None else padding.of_tokens(start, end)


def attend_square(
    kernel: Kernel,
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    *,
    scale: float,
    padding: torch.Tensor | None,
) -> Partial:
    """Attend a chunk to itself: causally, and not to its padding.

    Args:
        kernel: what computes.
        query: `[batch, kv_heads, group, q_len, key_dim]`.
        keys: `[batch, kv_heads, q_len, key_dim]`.
        values: `[batch, kv_heads, q_len, value_dim]`.
        scale: factor of the scores.
        padding: mask `[batch, 1, q_len]` of `keys`, or None.
    """
    if padding is None:
        return kernel.attend(query, keys, values, scale=scale, causal=True)
    return attend_band(
        kernel, query, keys, values, scale=scale, window_tokens=None, padding=padding
    )


def attend_band(
    kernel: Kernel,
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    *,
    scale: float,
    window_tokens: int | None,
    padding: torch.Tensor | None,
) -> Partial:
    """Attend each query to the keys up to its own and, with a window, to no more than that many.

    Args:
        kernel: what computes.
        query: `[batch, kv_heads, group, q_len, key_dim]`; the last query's own key is the last key.
        keys: `[batch, kv_heads, kv_len, key_dim]`, `kv_len >= q_len`.
        values: `[batch, kv_heads, kv_len, value_dim]`.
        scale: factor of the scores.
        window_tokens: keys a query sees, its own included; None for all.
        padding: mask `[batch, 1, kv_len]`, or None.
    """
    q_len, kv_len = query.shape[3], keys.shape[2]
    past = kv_len - q_len
    if q_len == 1 and (window_tokens is None or kv_len <= window_tokens):
        return kernel.attend(query, keys, values, scale=scale, mask=padding)
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
        parts.append(
            kernel.attend(
                query[:, :, :, first:last],
                keys[:, :, low:high],
                values[:, :, low:high],
                scale=scale,
                mask=visible,
            )
        )
    if len(parts) == 1:
        return parts[0]
    return Partial(
        torch.cat([part.out for part in parts], dim=3),
        torch.cat([part.lse for part in parts], dim=3),
    )
