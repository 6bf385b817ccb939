"""The memory that a model's weights take, however they are stored.

Quantised weights are packed, with scales in tensors of their own. bitsandbytes keeps these as
attributes of a parameter. Others have subclasses of tensors, which tell torch what is inside them.
compressed-tensors unpacks all weights when a model is first called, and they stay so.
"""

from collections.abc import Iterator
from typing import Any

import torch

_DEPTH = 3
"""Scales may be quantised too, with scales of their own."""


def weights_bytes(model: torch.nn.Module) -> int:
    """Return the bytes of parameters and buffers; memory that several share counts once."""
    return sum(bytes_by_device(model).values())


def tensor_bytes(tensor: torch.Tensor) -> int:
    """Return the bytes of one parameter, with its scales."""
    return sum(inner.nbytes for inner in _inside(tensor, _DEPTH))


def bytes_by_device(model: torch.nn.Module) -> dict[torch.device, int]:
    """Return the bytes of parameters and buffers on each device; shared memory counts once."""
    sizes: dict[torch.device, dict[int, int]] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        for inner in _inside(tensor, _DEPTH):
            # Tensors on the meta device have no address.
            key = inner.data_ptr() or id(inner)
            sizes.setdefault(inner.device, {})[key] = inner.nbytes
    totals = {device: sum(each.values()) for device, each in sizes.items()}
    for weight, more in _unpacked_later(model):
        totals[weight.device] += more
    return totals


def _unpacked_later(model: torch.nn.Module) -> Iterator[tuple[torch.Tensor, int]]:
    """Yield weights that the model's first call unpacks, and the bytes that they grow by."""
    if not hasattr(model, "ct_decompress_hook"):
        return
    itemsize = getattr(model, "dtype", torch.float32).itemsize
    for module in model.modules():
        stored = getattr(module, "weight_packed", getattr(module, "weight", None))
        if getattr(module, "quantization_scheme", None) is not None and stored is not None:
            linear: Any = module
            elements = linear.in_features * linear.out_features
            yield stored, elements * itemsize - stored.nbytes


def _inside(value: Any, depth: int) -> Iterator[torch.Tensor]:
    """Yield the tensors in which a tensor, or what belongs to it, is stored."""
    if depth < 0:
        return
    if isinstance(value, torch.Tensor):
        if hasattr(value, "__tensor_flatten__"):
            names, _context = value.__tensor_flatten__()
            for name in names:
                yield from _inside(getattr(value, name), depth)
            return
        yield value
    for part in getattr(value, "__dict__", {}).values():
        if isinstance(part, torch.Tensor) or type(part).__module__.startswith("bitsandbytes"):
            yield from _inside(part, depth - 1)
