"""Tensor-parallel models: which ranks there are, and which heads are this one's.

transformers leaves a model's config as it is when it splits the model. So what a rank computes is
asked of its modules: a projection of one token tells how many keys come out.
"""

import logging
import os
from dataclasses import replace
from typing import Any

import torch
from torch import distributed
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

from headinfer.errors import UnsupportedModelError
from headinfer.integration.support import attention_modules, layer_index
from headinfer.plan.shape import LayerShape, ModelShape
from headinfer.ranks.group import ALONE, Ranks
from headinfer.units import counted

_logger = logging.getLogger(__name__)

_KEY_PROJECTIONS = ("k_proj", "qkv_proj", "query_key_value")
"""What models call the product that keys come from."""


def ranks_of(model: PreTrainedModel) -> Ranks:
    """Return the ranks that a model's tensors are split over; `ALONE` where they are whole.

    Raises:
        UnsupportedModelError: they are split by other means than tensor parallelism.
    """
    if not (distributed.is_available() and distributed.is_initialized()):
        return ALONE
    mesh = next(
        (
            parameter.device_mesh
            for parameter in model.parameters()
            if hasattr(parameter, "device_mesh")
        ),
        None,
    )
    if mesh is not None and any(isinstance(module, FSDPModule) for module in model.modules()):
        raise UnsupportedModelError(_other_split(model, mesh, "FSDP"))
    if mesh is None and (getattr(model, "_tp_size", None) or 1) > 1:
        mesh = model._device_mesh["tp"]  # of quantised weights, which are plain tensors
    if mesh is None or mesh.size() == 1:
        return ALONE
    names = mesh.mesh_dim_names or ("tp",)
    if mesh.ndim > 1 or names[0] != "tp":
        raise UnsupportedModelError(_other_split(model, mesh, ", ".join(names)))
    return Ranks(mesh.get_group(), model.device)


def _other_split(model: PreTrainedModel, mesh: Any, how: str) -> str:
    """Say that a model is split in a way that is not served."""
    return (
        f"{type(model).__name__} is split over {counted(mesh.size(), 'process')} by {how}; only "
        "tensor parallelism is served, as by from_pretrained(..., tp_plan='auto')"
    )


def rank_shape(shape: ModelShape, model: PreTrainedModel, ranks: Ranks) -> ModelShape:
    """Return the shape of what one rank computes of a model.

    Args:
        shape: of the whole model, with the heads that stream; its weights are this rank's.
        model: split over the ranks.
        ranks: all of them.

    Raises:
        UnsupportedModelError: the ranks cannot share the KV heads.
    """
    if ranks.size == 1:
        return shape
    modules = {layer_index(module): module for module in attention_modules(model)}
    layers = tuple(
        _own_layer(layer, modules.get(at), model, ranks) for at, layer in enumerate(shape.layers)
    )
    whole = max((layer.kv_heads for layer in shape.layers), default=1)
    own = max((layer.kv_heads for layer in layers), default=1)
    split = replace(
        shape,
        layers=layers,
        query_heads=shape.query_heads * own // max(whole, 1),
        mlp_width=_own_mlp_width(shape.mlp_width, model),
        ranks=ranks.size,
    )
    return replace(split, uneven=not ranks.same(int(bool(split.full_layers))))


def _own_layer(
    layer: LayerShape, module: torch.nn.Module | None, model: PreTrainedModel, ranks: Ranks
) -> LayerShape:
    """Return a layer with this rank's heads; as it is where each rank has all of them."""
    projection = _key_projection(module)
    if not layer.kv_heads or projection is None:
        return layer
    whole, own = int(projection.out_features), _width_here(projection, model)
    if own == whole:
        return layer
    if layer.kv_heads % ranks.size or own * ranks.size != whole:
        raise UnsupportedModelError(refusal(type(model).__name__, layer.kv_heads, ranks.size))
    own_heads = layer.kv_heads // ranks.size
    first = ranks.index * own_heads
    streaming = layer.streaming
    if streaming is not None:
        heads = tuple(head - first for head in streaming.heads if first <= head < first + own_heads)
        streaming = replace(streaming, heads=heads) if heads else None
    return replace(layer, kv_heads=own_heads, streaming=streaming)


def refusal(name: str, kv_heads: int, ranks: int) -> str:
    """Say that ranks cannot share the KV heads of a model."""
    return (
        f"{name} has {counted(kv_heads, 'KV head')} in a layer, which {ranks} ranks cannot share "
        f"evenly; start a number of ranks that divides {kv_heads}"
    )


def _key_projection(module: Any) -> torch.nn.Linear | None:
    for name in _KEY_PROJECTIONS:
        projection = getattr(module, name, None)
        if isinstance(projection, torch.nn.Linear):
            return projection
    return None


def _own_mlp_width(width: int, model: PreTrainedModel) -> int:
    """Return the width of one MLP here; all of it where it cannot be told."""
    for module in model.modules():
        projection = getattr(module, "up_proj", None)
        if isinstance(projection, torch.nn.Linear):
            whole = int(projection.out_features)
            return -(-width * _width_here(projection, model) // whole)
    return width


def _width_here(projection: torch.nn.Linear, model: PreTrainedModel) -> int:
    """Return how many elements of a token a projection gives on this rank."""
    token = torch.zeros(1, 1, projection.in_features, dtype=model.dtype, device=model.device)
    with torch.no_grad():
        given: torch.Tensor = projection(token)
    return int(given.shape[-1])


def tell_of_ranks(ranks: Ranks) -> None:
    """Say, in one rank, what is slow where several share a model."""
    if ranks.size == 1 or ranks.index:
        return
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
    if torch.get_num_threads() == 1 and cores // ranks.on_host > 1:
        _logger.warning(
            "each rank has one CPU thread, which is what torchrun sets; call "
            "torch.set_num_threads(%d) for its share of the cores",
            cores // ranks.on_host,
        )
