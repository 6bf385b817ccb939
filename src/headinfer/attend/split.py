"""Splitting one tile along its tokens, so that few heads and queries still fill the machine.

A decode tile of one head is a single task to a flash kernel. Seen as `[splits, tokens / splits,
dim]` it is `splits` tasks, without a copy; their partials merge by LSE like any others.
"""

import math
from typing import Protocol

import torch

_PARTS_PER_THREAD = 8
"""Of 15 threads on an H100's host, as many read 123 GB/s, one 88, and more no faster."""


class FusedCall(Protocol):
    """A fused attention over `[batch, heads, rows, dim]` that returns its output and LSE."""

    def __call__(
        self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float, /
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the output `[batch, heads, rows, dim]` and LSE `[batch, heads, rows]`."""


def attend_split(
    call: FusedCall,
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    scale: float,
    splits: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend a single batch row in `splits` parts at once.

    Args:
        call: the kernel.
        query: `[1, heads, rows, key_dim]`.
        keys: `[1, heads, kv_len, key_dim]`, contiguous over tokens and dims.
        values: `[1, heads, kv_len, value_dim]`, likewise.
        scale: factor of the scores.
        splits: parts; the up to `splits - 1` tokens left over are attended in a call of their own.

    Returns:
        Output `[1, heads, rows, value_dim]` in the query's dtype and LSE `[1, heads, rows]`.
    """
    kv_len = keys.shape[2]
    part = kv_len // splits
    if splits <= 1 or part == 0:
        return call(query, keys, values, scale)
    even = part * splits
    out, lse = call(
        query[0].unsqueeze(1).expand(-1, splits, -1, -1),
        keys[0, :, :even].unflatten(1, (splits, part)),
        values[0, :, :even].unflatten(1, (splits, part)),
        scale,
    )
    if even < kv_len:
        rest_out, rest_lse = call(query, keys[:, :, even:], values[:, :, even:], scale)
        out = torch.cat((out, rest_out.transpose(0, 1)), dim=1)
        lse = torch.cat((lse, rest_lse.transpose(0, 1)), dim=1)
    merged, total = merge_splits(out, lse)
    return merged.unsqueeze(0).to(query.dtype), total.unsqueeze(0)


def merge_splits(out: torch.Tensor, lse: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Merge the parts of each head.

    Args:
        out: `[heads, splits, ..., dim]`.
        lse: `[heads, splits, ...]`, each finite.

    Returns:
        Output `[heads, ..., dim]` in the dtype of the LSE or wider, and LSE `[heads, ...]`.
    """
    total = torch.logsumexp(lse, dim=1)
    weights = torch.exp(lse - total.unsqueeze(1)).unsqueeze(-1)
    return (out * weights).sum(dim=1), total


def stealable_splits(threads: int, heads: int, most: int) -> int:
    """Return parts of each head that threads take one after another, as each is done with its last.

    There are enough of them that cores which are slower than others hardly keep those waiting.

    Args:
        threads: that share the work.
        heads: number of heads.
        most: parts of one head that are worth it; one is made in any case.
    """
    wanted = -(-_PARTS_PER_THREAD * threads // heads) if threads > 1 else 1
    return min(wanted, max(most, 1))


def even_splits(threads: int, heads: int, most: int) -> int:
    """Return as few parts of each head as give every thread the same number of them.

    Args:
        threads: that share the work.
        heads: number of heads.
        most: parts of one head that are worth it; one is made in any case.
    """
    return min(threads // math.gcd(threads, heads), max(most, 1))
