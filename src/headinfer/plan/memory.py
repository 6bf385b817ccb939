"""Bytes on the device: staging tiles, pages of new tokens, and activations.

Symbols follow the paper's Table 10: the device holds weights, the KV tiles now being attended, and
the activations of one chunk. Ours differ in that a tile also has a fixed number of tokens, so none
of the terms grows with the context.
"""

from headinfer.plan.shape import ModelShape

STAGING_BUFFERS = 3
"""Tiles on the device at once: one attended, the next landing, one more so that the link need not
wait for the attention of a tile that was shorter than its copy."""

PAGES = 2
"""Pages of new tokens: one is written while the other goes back to the host."""

ALIGNMENT_BYTES = 256
"""Every piece of the arena starts on such a boundary: what fused kernels and copy engines like."""

_FLOAT32_BYTES = 4


def aligned(num_bytes: int) -> int:
    """Return a size rounded up to whole alignments."""
    return -(-num_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


def staging_bytes(shape: ModelShape, *, tile_heads: int, tile_tokens: int, batch: int) -> int:
    """Bytes of the staging buffers, sized for the widest offloaded layer."""
    elements = max(
        (
            min(tile_heads, layer.kv_heads) * (layer.key_dim + layer.value_dim)
            for layer in shape.full_layers
        ),
        default=0,
    )
    return STAGING_BUFFERS * aligned(batch * tile_tokens * elements * shape.kv_itemsize)


def tail_bytes(shape: ModelShape, *, page_tokens: int, batch: int) -> int:
    """Bytes of every offloaded layer's decode tail: `PAGES` pages each."""
    return PAGES * sum(
        aligned(batch * page_tokens * layer.elements_per_token * shape.kv_itemsize)
        for layer in shape.full_layers
    )


def chunk_page_bytes(shape: ModelShape, *, chunk_tokens: int, batch: int) -> int:
    """Bytes of the pages a prefill chunk is written back from, shared by all layers."""
    elements = max((layer.elements_per_token for layer in shape.full_layers), default=0)
    return PAGES * aligned(batch * chunk_tokens * elements * shape.kv_itemsize)


def resident_bytes(shape: ModelShape, *, resident_tokens: int, batch: int) -> int:
    """Bytes of the oldest tokens of every offloaded layer, kept on the device."""
    return sum(
        aligned(batch * resident_tokens * layer.elements_per_token * shape.kv_itemsize)
        for layer in shape.full_layers
    )


def activation_bytes(shape: ModelShape, *, chunk_tokens: int, tile_heads: int, batch: int) -> int:
    """Peak bytes of activations while one chunk passes through a layer, and of the last logits.

    The larger of the attention phase (residual, normed input, query before and after rotation with
    one temporary, folded query, keys and values likewise, output, and the float32 partials of one
    group of heads) and the MLP phase (residual, normed input, gate, up and their product).
    """
    item = shape.kv_itemsize
    attention = 0
    for layer in shape.layers:
        if layer.kv_heads:
            group = shape.query_heads // layer.kv_heads
            query = shape.query_heads * layer.key_dim
            partial = min(tile_heads, layer.kv_heads) * group * layer.value_dim
            width = 2 * shape.hidden_size + 5 * query + 3 * layer.elements_per_token // 2
            attention = max(attention, width * item + partial * (item + 2 * _FLOAT32_BYTES))
    mlp = (3 * shape.hidden_size + 3 * shape.mlp_width) * item
    logits = 2 * shape.vocab_size * _FLOAT32_BYTES
    return batch * (chunk_tokens * max(attention, mlp) + logits)
