"""Stored tokens in memory of somebody else: tensors for users, and the stores of a copied cache.

Both are rare, so they wait on the host for what they started, and need no edge of their own. The
engine settles its streams before it calls either.
"""

from typing import Literal, TypeAlias

import torch

from headinfer.device.base import Device
from headinfer.engine.tiles import StoredLayer
from headinfer.store.layer import LayerStore, Span

Part: TypeAlias = Literal["keys", "values"]


def _of(span: Span, part: Part) -> torch.Tensor:
    return span.keys if part == "keys" else span.values


def _copy(device: Device, destination: torch.Tensor, source: torch.Tensor) -> None:
    """Copy on compute, which wrote the tail; where there are no streams, here and now."""
    if device.tiles_are_views:
        destination.copy_(source)
    else:
        device.compute.copy(destination, source)


def part_shape(layer: StoredLayer, tokens: int, part: Part) -> tuple[int, int, int, int]:
    """Return the shape of a layer's keys or values, when it holds `tokens` tokens."""
    geometry = layer.store.geometry
    dim = geometry.key_dim if part == "keys" else geometry.value_dim
    return geometry.batch, geometry.kv_heads, tokens, dim


def read(device: Device, layer: StoredLayer, tail: Span | None, part: Part) -> torch.Tensor:
    """Return all of a layer's keys or values in new memory.

    Resident tokens are read in the store, which has them too.

    Args:
        device: where the tensor is made.
        layer: at rest.
        tail: its tokens that are not in the store.
        part: which of the two.

    Returns:
        `[batch, kv_heads, tokens, dim]` on the device, which the caller owns.
    """
    store = layer.store
    tokens = store.tokens + (tail.tokens if tail is not None else 0)
    shape = part_shape(layer, tokens, part)
    out = torch.empty(shape, dtype=store.geometry.dtype, device=device.torch_device)
    spans = list(store.spans(0, store.tokens)) + ([] if tail is None else [tail])
    for span in spans:
        _copy(device, out[:, :, span.start : span.start + span.tokens], _of(span, part))
    device.finish_compute()  # the store may change as soon as this returns
    return out


def copy_into(device: Device, target: LayerStore, layer: StoredLayer, tail: Span | None) -> None:
    """Let an empty store hold all of a layer's tokens.

    Args:
        device: of both.
        target: with no copy in flight that touches it.
        layer: at rest.
        tail: its tokens that are not in its store.

    Raises:
        MemoryPlanError: the host memory cannot be had.
    """
    target.copy_from(layer.store)
    if tail is None:
        return
    for span in target.extend(tail.tokens):
        part = slice(span.start - tail.start, span.start - tail.start + span.tokens)
        _copy(device, span.keys, tail.keys[:, :, part])
        _copy(device, span.values, tail.values[:, :, part])
    device.finish_compute()
