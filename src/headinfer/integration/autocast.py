"""Attention under `torch.autocast`, which knows torch's attention and not ours."""

import contextlib

import torch

from headinfer.errors import UnsupportedModelError

_CAST = frozenset({torch.float32, torch.float16, torch.bfloat16})
_AS_IS = contextlib.nullcontext()


def attended_dtype(dtype: torch.dtype, device_type: str) -> torch.dtype:
    """Return the dtype in which tensors of `dtype` are attended here: autocast's where it is on."""
    if dtype in _CAST and torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return dtype


def without_autocast(device_type: str) -> contextlib.AbstractContextManager[object]:
    """Switch autocast off, where it is on: kernels choose their own precision."""
    if torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return _AS_IS


def in_attended_dtype(
    name: str, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return a layer's query, keys and values in the one dtype in which they are attended.

    Under autocast rotary embeddings make queries and keys float32, and values are not; there torch
    casts all three when it attends them.

    Raises:
        UnsupportedModelError: they differ without autocast.
    """
    device_type = query.device.type
    if torch.is_autocast_enabled(device_type):
        query, keys, values = (
            part.to(attended_dtype(part.dtype, device_type)) for part in (query, keys, values)
        )
    if not query.dtype == keys.dtype == values.dtype:
        raise UnsupportedModelError(
            f"{name} attends a query in {query.dtype}, keys in {keys.dtype} and values in "
            f"{values.dtype}: not served; convert the model to one dtype or use torch.autocast"
        )
    return query, keys, values
