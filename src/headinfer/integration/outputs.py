"""What a captured step gives, and what its callers are given: the same, in memory of their own."""

from typing import Any

import torch
from torch.utils import _pytree as pytree

from headinfer.device.base import CaptureError
from headinfer.integration.cache import OffloadedCache

_CACHE = object()
"""What stands for the cache in a captured output, which must not keep the cache alive."""


_NEAR = 0.125
"""Share of the largest logit. Eight bits of a mantissa and 32 layers make some hundredths."""


def without_cache(output: Any, cache: OffloadedCache) -> Any:
    """Return a model's output with something else in place of its cache.

    Raises:
        CaptureError: there is something in it that cannot be copied and compared.
    """

    def leave_out(leaf: Any) -> Any:
        if leaf is cache:
            return _CACHE
        if leaf is None or isinstance(leaf, (torch.Tensor, bool, int, float, str)):
            return leaf
        raise CaptureError(f"the model's output has a {type(leaf).__name__} in it")

    return pytree.tree_map(leave_out, output)


def handed_out(output: Any, cache: OffloadedCache) -> Any:
    """Return what a call returns of what `without_cache` did."""

    def hand_out(leaf: Any) -> Any:
        if leaf is _CACHE:
            return cache
        return leaf.clone() if isinstance(leaf, torch.Tensor) else leaf

    return pytree.tree_map(hand_out, output)


def are_equal(output: Any, other: Any) -> bool:
    """Whether two outputs are the same to the last bit, NaN included."""
    leaves, others = pytree.tree_leaves(output), pytree.tree_leaves(other)
    return len(leaves) == len(others) and all(map(_equal, leaves, others))


def are_near(output: Any, other: Any) -> bool:
    """Whether two outputs differ by no more than rounding to 16 bits makes of many layers."""
    pairs = zip(pytree.tree_leaves(output), pytree.tree_leaves(other), strict=True)
    return all(_near(leaf, twin) for leaf, twin in pairs if isinstance(leaf, torch.Tensor))


def _near(leaf: torch.Tensor, other: torch.Tensor) -> bool:
    if not leaf.is_floating_point():
        return True
    error, scale = (leaf.float() - other.float()).abs().max(), other.float().abs().max()
    return not bool(error > _NEAR * scale)  # so that NaN in both is near


def _equal(leaf: Any, other: Any) -> bool:
    if not isinstance(leaf, torch.Tensor) or not isinstance(other, torch.Tensor):
        return leaf is other or (type(leaf) is type(other) and bool(leaf == other))
    if leaf.shape != other.shape or leaf.dtype != other.dtype:
        return False
    return torch.equal(_bytes(leaf), _bytes(other))


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).contiguous().view(torch.uint8)
