"""Attention where queries differ in what they see, so that the group cannot be folded into them."""

from collections.abc import Callable

import torch

from headinfer.attend.partial import Partial, stack_rows

GroupedCall = Callable[
    [torch.Tensor, torch.Tensor, torch.Tensor, int], tuple[torch.Tensor, torch.Tensor]
]
"""A fused attention of one row of the batch: query, keys and values `[kv_heads, group, length,
dim]` and the row's index, to output and LSE."""


def attend_grouped(
    call: GroupedCall, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
) -> Partial:
    """Attend row by row of the batch, without expanding keys over the group.

    The heads take the kernel's batch axis and the group its head axis, over which keys are repeated
    by a stride of 0: nothing is copied.

    Args:
        call: the kernel.
        query: `[batch, kv_heads, group, q_len, key_dim]`.
        keys: `[batch, kv_heads, kv_len, key_dim]`.
        values: `[batch, kv_heads, kv_len, value_dim]`.
    """
    group = query.shape[2]
    parts = []
    for row in range(query.shape[0]):
        out, lse = call(
            query[row],
            keys[row].unsqueeze(1).expand(-1, group, -1, -1),
            values[row].unsqueeze(1).expand(-1, group, -1, -1),
            row,
        )
        parts.append(Partial(out, lse))
    return stack_rows(parts)
