"""New tokens between a cache's `update` and the attention call that takes them."""

from typing import NamedTuple

import torch

from headinfer.engine.parted import CacheEngine


class Pending(NamedTuple):
    """A layer's new tokens, which its attention must take next.

    Attributes:
        engine: of the cache.
        layer_idx: which layer, counted among those that attend.
        keys: of the new tokens, `[batch, kv_heads, q_len, key_dim]`.
        values: of the new tokens, `[batch, kv_heads, q_len, value_dim]`.
        window_tokens: the window that the layer keeps; None where it keeps all.
        in_turn: whether the thread has its turn at the model.
    """

    engine: CacheEngine
    layer_idx: int
    keys: torch.Tensor
    values: torch.Tensor
    window_tokens: int | None
    in_turn: bool
