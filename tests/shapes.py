"""Model shapes for tests that need no model."""

import dataclasses

from headinfer.plan.shape import LayerKind, LayerShape, ModelShape


def model_shape(
    *,
    layers: int = 2,
    window_tokens: int = 0,
    kv_heads: int = 2,
    group: int = 2,
    key_dim: int = 8,
    value_dim: int = 8,
    itemsize: int = 4,
    weights_bytes: int = 1000,
    max_positions: int = 2**20,
) -> ModelShape:
    """Return a shape of full layers; with `window_tokens`, every second one has a window."""
    layer = LayerShape(kind=LayerKind.FULL, kv_heads=kv_heads, key_dim=key_dim, value_dim=value_dim)
    window = dataclasses.replace(layer, kind=LayerKind.SLIDING, window_tokens=window_tokens)
    kinds = (window if window_tokens else layer, layer)
    return ModelShape(
        name="Tiny",
        layers=tuple(kinds[position % 2] for position in range(layers)),
        query_heads=kv_heads * group,
        hidden_size=kv_heads * group * key_dim,
        mlp_width=64,
        vocab_size=100,
        weights_bytes=weights_bytes,
        kv_itemsize=itemsize,
        max_positions=max_positions,
    )


# Llama-3-8B: 32 layers of 8 KV heads, head_dim 128, bfloat16.
LLAMA_3_8B = ModelShape(
    name="Llama-3-8B",
    layers=(LayerShape(kind=LayerKind.FULL, kv_heads=8, key_dim=128, value_dim=128),) * 32,
    query_heads=32,
    hidden_size=4096,
    mlp_width=14336,
    vocab_size=128256,
    weights_bytes=2 * 8_030_261_248,
    kv_itemsize=2,
    max_positions=8192,
)
