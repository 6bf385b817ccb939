"""Calls of torch's fused operators, which also return the LSE: at once, in splits, or by rows."""

import functools
from collections.abc import Callable

import torch

from headinfer.attend.partial import Accumulator, Partial

FusedCall = Callable[..., tuple[torch.Tensor, ...]]
"""A fused attention of query, keys and values `[batch, heads, length, dim]`, and `scale`.

Its first results are the output `[batch, heads, rows, dim]` and the LSE `[batch, heads, rows]`,
whose rows may be more, or have an axis of 1 behind them.
"""


def operator(name: str, **options: object) -> FusedCall:
    """Return a private operator of torch's; where there is none, a call of it fails.

    Torch's own function spares a third of the time that a call by `torch.ops` takes, 5 us.
    """
    name = f"_scaled_dot_product_{name}"
    found = getattr(torch, name, getattr(torch.ops.aten, name, _missing))
    return functools.partial(found, dropout_p=0.0, **options)


def _missing(*_tensors: torch.Tensor, **_options: object) -> tuple[torch.Tensor, ...]:
    raise NotImplementedError("this torch has no such operator")


def attend_split(
    call: FusedCall,
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    scale: float,
    splits: int,
    group: int,
) -> Partial:
    """Attend in `splits` parts of the tokens at once, so that few heads still fill the machine.

    A decode tile of one head is a single task to a flash kernel. Seen as `[splits, tokens / splits,
    dim]` it is `splits` tasks, without a copy; their partials merge by LSE like any others.

    Args:
        call: the operator.
        query: `[batch, heads, group * q_len, key_dim]`.
        keys: `[batch, heads, kv_len, key_dim]`, contiguous over tokens and dims.
        values: `[batch, heads, kv_len, value_dim]`, contiguous over tokens and dims.
        scale: factor of the scores.
        splits: parts, of a single row of the batch; the up to `splits - 1` tokens left over are
            attended in a call of their own.
        group: query heads that share a KV head.
    """
    rows, kv_len = query.shape[2], keys.shape[2]
    shape = (group, rows // group)
    if splits <= 1 or kv_len < splits:
        out, lse = call(query, keys, values, scale=scale)[:2]
        lse = lse[:, :, :rows].reshape(out.shape[:3])
        return Partial(out.unflatten(2, shape), lse.unflatten(2, shape))
    part = kv_len // splits
    even = part * splits
    out, lse = call(
        query[0].unsqueeze(1).expand(-1, splits, -1, -1),
        keys[0, :, :even].unflatten(1, (splits, part)),
        values[0, :, :even].unflatten(1, (splits, part)),
        scale=scale,
    )[:2]
    lse = lse[:, :, :rows].reshape(out.shape[:3])
    if even < kv_len:
        last, last_lse = call(query, keys[:, :, even:], values[:, :, even:], scale=scale)[:2]
        last_lse = last_lse[:, :, :rows].reshape(last.shape[:3])
        out = torch.cat((out, last.transpose(0, 1)), dim=1)
        lse = torch.cat((lse, last_lse.transpose(0, 1)), dim=1)
    merged = merge_splits(Partial(out, lse))
    out, lse = merged.out.transpose(0, 1).to(query.dtype), merged.lse.transpose(0, 1)
    return Partial(out.unflatten(2, shape), lse.unflatten(2, shape))


def merge_splits(parts: Partial) -> Partial:
    """Merge the parts of each head, `[heads, splits, ...]`, half of them with the other half.

    So it takes a number of launches that grows with the logarithm of the splits.
    """
    while (half := parts.lse.shape[1] // 2) > 0:
        total = Accumulator()
        for start in (0, half):
            part = slice(start, start + half)
            total.add(Partial(parts.out[:, part], parts.lse[:, part]))
        merged = total.result()
        if parts.lse.shape[1] > 2 * half:
            out = torch.cat((merged.out, parts.out[:, 2 * half :]), dim=1)
            merged = Partial(out, torch.cat((merged.lse, parts.lse[:, 2 * half :]), dim=1))
        parts = merged
    return parts


def attend_grouped(
    call: FusedCall,
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    scale: float,
    bias: torch.Tensor | None = None,
) -> Partial:
    """Attend where queries differ in what they see: the group cannot be folded into them.

    The rows of the batch are attended one by one. The heads take the operator's batch axis and the
    group its head axis. Keys are repeated over the group by a stride of 0: nothing is copied.

    Args:
        call: the operator.
        query: `[batch, kv_heads, group, q_len, key_dim]`.
        keys: `[batch, kv_heads, kv_len, key_dim]`.
        values: `[batch, kv_heads, kv_len, value_dim]`.
        scale: factor of the scores.
        bias: added to them, `[batch or 1, 1, q_len, kv_len]`; None for none.
    """
    batch, _, group, q_len, _ = query.shape
    outs, lses = [], []
    for row in range(batch):
        more = {}
        if bias is not None:
            more["attn_mask"] = bias[row : row + 1] if bias.shape[0] > 1 else bias
        out, lse = call(
            query[row],
            keys[row].unsqueeze(1).expand(-1, group, -1, -1),
            values[row].unsqueeze(1).expand(-1, group, -1, -1),
            scale=scale,
            **more,
        )[:2]
        outs.append(out)
        lses.append(lse[:, :, :q_len].reshape(out.shape[:3]))
    if batch == 1:
        return Partial(outs[0].unsqueeze(0), lses[0].unsqueeze(0))
    return Partial(torch.stack(outs), torch.stack(lses))


def attend_shared(
    call: FusedCall, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float
) -> Partial:
    """Attend queries and keys of the same tokens by an operator that knows groups of heads.

    Few views are made, as each takes the caller's thread microseconds.

    Args:
        call: the operator.
        query: `[batch, kv_heads, group, q_len, key_dim]`.
        keys: `[batch, kv_heads, q_len, key_dim]`.
        values: `[batch, kv_heads, q_len, value_dim]`.
        scale: factor of the scores.
    """
    shape = query.shape[:4]
    out, lse = call(query.flatten(1, 2), keys, values, scale=scale)[:2]
    if lse.shape[2] > shape[3]:
        lse = lse[:, :, : shape[3]]
    return Partial(out.view(*shape, out.shape[3]), lse.view(shape))
