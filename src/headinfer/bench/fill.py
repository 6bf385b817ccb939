"""Filling a cache with random keys and values, at the cost of writing them and no more."""

import functools
from collections.abc import Callable, Iterator

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from headinfer.bench.recorded import recorded_values
from headinfer.errors import UnsupportedModelError
from headinfer.integration.cache import OffloadedCache
from headinfer.integration.layer import OffloadedLayer
from headinfer.integration.model_shape import model_shape
from headinfer.integration.placement import placement_of
from headinfer.integration.shards import ranks_of
from headinfer.plan.shape import LayerKind, LayerShape

_CHUNK_TOKENS = 8192


def fill_randomly(
    model: PreTrainedModel, cache: Cache, tokens: int, seed: int, *, recorded: bool = False
) -> None:
    """Let an empty cache hold tokens, whose keys and values depend on nothing but the seed.

    Args:
        model: the model the cache is for.
        cache: transformers' own or ours; updated in place.
        tokens: how many.
        seed: of keys and values.
        recorded: whether exponents are distributed as those of real models; else values are normal.

    Raises:
        UnsupportedModelError: the model has layers without keys and values.
    """
    shapes = model_shape(model).layers
    if any(shape.kind is LayerKind.STATE for shape in shapes):
        raise UnsupportedModelError("layers without keys and values cannot be filled at random")
    engine, offloaded, places = None, 0, placement_of(model).layers
    rank = ranks_of(model).index
    if isinstance(cache, OffloadedCache):
        cache.state.prepare(1, tokens)
        engine = cache.state.engine
    for position, shape in enumerate(shapes):
        where = places[position]
        generator = torch.Generator(where).manual_seed(seed + position)
        draw = functools.partial(_draw, position if recorded else None, model.dtype, generator)
        chunks = _random_chunks(shape, tokens, draw)
        layer = cache.layers[position] if position < len(cache.layers) else None
        if engine is not None and isinstance(layer, OffloadedLayer):
            own = engine.plan.shape.attention_layers[offloaded]
            heads = _own_heads(own, rank, shape.kv_heads)
            for keys, values in chunks:
                engine.append(offloaded, keys[:, heads], values[:, heads])
            offloaded += 1
            continue
        keys, values = (
            torch.empty(1, shape.kv_heads, tokens, dim, dtype=model.dtype, device=where)
            for dim in _dims(shape)
        )
        for start, (new_keys, new_values) in zip(
            range(0, tokens, _CHUNK_TOKENS), chunks, strict=True
        ):
            part = slice(start, start + _CHUNK_TOKENS)
            keys[:, :, part], values[:, :, part] = new_keys, new_values
        cache.update(keys, values, position)


def _own_heads(layer: LayerShape, rank: int, heads: int) -> slice:
    """Return which of a layer's heads a rank has; all of them where each rank has."""
    if layer.kv_heads == heads:
        return slice(None)
    return slice(rank * layer.kv_heads, (rank + 1) * layer.kv_heads)


def _dims(shape: LayerShape) -> tuple[int, int]:
    return shape.key_dim, shape.value_dim


def _random_chunks(
    shape: LayerShape, tokens: int, draw: Callable[[str, tuple[int, ...]], torch.Tensor]
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield keys and values of a layer, a few thousand tokens at a time."""
    for start in range(0, tokens, _CHUNK_TOKENS):
        count = min(_CHUNK_TOKENS, tokens - start)
        keys, values = (
            draw(part, (1, shape.kv_heads, count, dim))
            for part, dim in zip(("keys", "values"), _dims(shape), strict=True)
        )
        yield keys, values


def _draw(
    recorded_layer: int | None,
    dtype: torch.dtype,
    generator: torch.Generator,
    part: str,
    shape: tuple[int, ...],
) -> torch.Tensor:
    """Return keys or values, normal ones where there is no number of a layer."""
    if recorded_layer is None:
        return torch.empty(shape, dtype=dtype, device=generator.device).normal_(generator=generator)
    return recorded_values(shape, part, recorded_layer, dtype, generator)
