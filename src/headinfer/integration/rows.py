"""Rows of a batch as callers name them: tensors, lists, tuples, masks, ranges, negative numbers."""

from typing import Any

import torch


def chosen_rows(indices: Any, batch: int) -> torch.Tensor:
    """Return the numbers of chosen rows, as indexing an axis of `batch` rows understands them.

    Args:
        indices: anything that indexes one axis: numbers, also from the end, or a mask.
        batch: rows there are.

    Returns:
        `[rows]` of int64 on the CPU, each from 0 to before `batch`.

    Raises:
        IndexError: there is no such row.
        ValueError: not a list of rows, or none is chosen.
    """
    if isinstance(indices, torch.Tensor):
        indices = indices.cpu()
    elif not isinstance(indices, slice):
        indices = torch.as_tensor(
            list(indices) if hasattr(indices, "__iter__") else indices, device="cpu"
        )
        if not indices.numel():
            indices = indices.long()  # an empty list is of floats
    rows = torch.arange(batch, device="cpu")[indices]
    if rows.ndim != 1 or not rows.numel():
        raise ValueError(f"a cache keeps one row or more, given as a list, not {indices!r}")
    return rows
