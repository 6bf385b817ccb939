"""Bytes on the device: CUDA itself, staging tiles, pages of new tokens, and activations.

Symbols follow the paper's Table 10: the device holds weights, the KV tiles now being attended, and
the activations of one chunk. Ours differ in that a tile also has a fixed number of tokens, so none
of the terms grows with the context.
"""

import math

from headinfer.plan.format import Format
from headinfer.plan.shape import LayerShape, ModelShape

STAGING_BUFFERS = 3
"""Tiles on the device at once: one attended, the next landing, and one more. With it the link need
not wait for the attention of a tile that was shorter than its copy."""

PAGES = 2
"""Pages of new tokens: one is written while the other goes back to the host."""

SPARE_TOKENS = 256
"""Tokens that a window keeps beyond what its queries see, so that as many can be taken back
when drafts are rejected."""

DRAFT_SINK_TOKENS = 64
"""The oldest tokens that drafts attend, and a quarter of all at the most."""

MOST_DRAFTED = 32
"""Tokens that may be drafted at once. Few texts are foreseen so far."""

KEYS_AND_VALUES = 2

ALIGNMENT_BYTES = 256
"""Every piece of the arena starts on such a boundary: what fused kernels and copy engines like."""

DISK_ALIGNMENT_BYTES = 4096
"""What reads and writes past the page cache begin at, and are multiples of."""

CUDA_OUTSIDE_BYTES = 768 * 2**20
"""What CUDA's context and the handles of its libraries take beside torch's allocator.

Measured with torch 2.11 and CUDA 13.0 on an H100: 0.75 GiB.
"""

CUDA_GRAPHS_BYTES = 128 * 2**20
"""What captured steps take beside torch's allocator, with those of drafts and of verifying passes.

Measured on the same H100 for steps of one token: 2 to 50 MiB.
"""

_CUDA_FRAGMENTS_BYTES = 512 * 2**20 - CUDA_GRAPHS_BYTES
"""What torch's allocator holds and cannot use, and cuBLAS's workspaces.

Measured on the same H100, when a prefill of Llama-3-8B in chunks of 8K tokens asked for 224 MiB
more. They took 285 MiB and 32, and 256 MiB were too few. Larger chunks take more: see
`_fragments_beyond`.
"""

_USUAL_TENSOR_BYTES = 224 * 2**20
"""The MLP's tensor in that prefill."""

_WEIGHTS_SHARE = 0.9
"""Share of the memory beside CUDA itself that weights take of a GPU; KV and activations follow."""

_FLOAT32_BYTES = 4
_POSITION_BYTES = 8


def aligned(num_bytes: int) -> int:
    """Return a size rounded up to whole alignments."""
    return -(-num_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


def block_bytes(num_bytes: int) -> int:
    """Return the bytes of a block of host memory above a disk: rounded up to what is written."""
    return -(-num_bytes // DISK_ALIGNMENT_BYTES) * DISK_ALIGNMENT_BYTES


def blocks_bytes(shape: ModelShape, tokens: int, block_tokens: int, batch: int) -> int:
    """Return the bytes of the blocks of all offloaded layers that have so many tokens."""
    each = (layer.host_bytes(block_tokens, shape.kv_itemsize) for layer in shape.full_layers)
    return -(-tokens // block_tokens) * sum(block_bytes(batch * size) for size in each)


def runtime_bytes(device: str) -> int:
    """Bytes that running on a device takes beside weights, KV and activations; none without CUDA.

    Args:
        device: "cpu", "cuda" or "simulated".
    """
    return sum(runtime_parts(device).values())


def runtime_parts(device: str) -> dict[str, int]:
    """Return what `runtime_bytes` is made of, by what takes the bytes."""
    if device != "cuda":
        return {}
    return {
        "context and libraries": CUDA_OUTSIDE_BYTES,
        "captured decode steps": CUDA_GRAPHS_BYTES,
        "fragments": _CUDA_FRAGMENTS_BYTES,
    }


def weights_room_bytes(given_bytes: int) -> int:
    """Return the bytes of weights that accelerate may put on a GPU which gives so much memory."""
    return max(int((given_bytes - runtime_bytes("cuda")) * _WEIGHTS_SHARE), 0)


def memory_for_weights_bytes(weights_bytes: int) -> int:
    """Return the memory that a GPU must give for `weights_room_bytes` to be so much."""
    return math.ceil(weights_bytes / _WEIGHTS_SHARE) + runtime_bytes("cuda")


def staging_bytes(shape: ModelShape, *, tile_heads: int, tile_tokens: int, batch: int) -> int:
    """Bytes of the staging buffers, sized for the widest offloaded layer as the host has it."""
    tiles = [
        layer.host_bytes(
            covering_tokens(layer.host_format, tile_tokens), shape.kv_itemsize, tile_heads
        )
        for layer in shape.kinds_of_full_layers
    ]
    return STAGING_BUFFERS * aligned(batch * max(tiles, default=0))


def covering_tokens(form: Format, tokens: int) -> int:
    """Return the tokens whose rows always cover so many, wherever these begin."""
    return tokens + form.row_tokens - 1 if tokens else 0


def unpacked_bytes(shape: ModelShape, *, tile_heads: int, tile_tokens: int, batch: int) -> int:
    """Bytes of the buffer that packed tiles are unpacked into, one after the other."""
    tokens = covering_tokens(Format.PACKED, tile_tokens)
    tokens = Format.PACKED.rows(tokens) * Format.PACKED.row_tokens
    elements = [
        min(tile_heads, layer.kv_heads) * (layer.key_dim + layer.value_dim)
        for layer in _packed_kinds(shape)
    ]
    return aligned(batch * tokens * max(elements, default=0) * shape.kv_itemsize)


def packed_bytes(shape: ModelShape, *, chunk_tokens: int, batch: int) -> int:
    """Bytes of the pages that tokens are packed into on their way home, shared by all layers."""
    tokens = covering_tokens(Format.PACKED, chunk_tokens)
    each = [layer.host_bytes(tokens, shape.kv_itemsize) for layer in _packed_kinds(shape)]
    return PAGES * aligned(batch * max(each, default=0))


def _packed_kinds(shape: ModelShape) -> list[LayerShape]:
    kinds = shape.kinds_of_full_layers
    return [layer for layer in kinds if layer.host_format is not Format.DENSE]


def tail_bytes(shape: ModelShape, *, page_tokens: int, batch: int) -> int:
    """Bytes of every offloaded layer's decode tail: `PAGES` pages each."""
    return PAGES * resident_bytes(shape, resident_tokens=page_tokens, batch=batch)


def chunk_page_bytes(shape: ModelShape, *, chunk_tokens: int, batch: int) -> int:
    """Bytes of the pages a prefill chunk is written back from, shared by all layers."""
    elements = max((layer.elements_per_token for layer in shape.kinds_of_full_layers), default=0)
    return PAGES * aligned(batch * chunk_tokens * elements * shape.kv_itemsize)


def window_capacity(window_tokens: int, page_tokens: int) -> int:
    """Return the past tokens that a window has memory for, a page of new ones included."""
    return window_tokens - 1 + SPARE_TOKENS + page_tokens


def window_bytes(shape: ModelShape, *, chunk_tokens: int, page_tokens: int, batch: int) -> int:
    """Bytes of the sliding layers' windows while chunks pass through.

    One layer at a time also holds its window and the chunk in one piece; of a short chunk, and
    what is spare.
    """
    elements = sum(
        (layer.sink_tokens + window_capacity(layer.window_tokens, page_tokens))
        * layer.elements_per_token
        for layer in shape.windows
    )
    elements += max(
        (
            (layer.window_tokens - 1 + max(chunk_tokens, 2 * SPARE_TOKENS))
            * layer.elements_per_token
            for layer in shape.windows
        ),
        default=0,
    )
    return batch * elements * shape.kv_itemsize


def resident_bytes(shape: ModelShape, *, resident_tokens: int, batch: int) -> int:
    """Bytes of the oldest tokens of every offloaded layer, kept on the device."""
    return sum(
        layers * aligned(batch * resident_tokens * elements * shape.kv_itemsize)
        for elements, layers in shape.elements_of_full_layers.items()
    )


def resident_tokens(shape: ModelShape, num_bytes: int, *, batch: int) -> int:
    """Return the tokens whose `resident_bytes` fit in `num_bytes`."""
    token_bytes = shape.kv_bytes(1, batch)
    if not token_bytes:
        return 0
    return max((num_bytes - ALIGNMENT_BYTES * len(shape.full_layers)) // token_bytes, 0)


def draft_sink_tokens(draft_tokens: int) -> int:
    """Return how many of the tokens that drafts attend are the oldest; others are the newest."""
    return min(DRAFT_SINK_TOKENS, draft_tokens // 4)


def draft_bytes(shape: ModelShape, *, draft_tokens: int, batch: int) -> int:
    """Bytes of what drafts attend of every offloaded layer, and of the drafted tokens."""
    if not draft_tokens:
        return 0
    return resident_bytes(shape, resident_tokens=draft_tokens + MOST_DRAFTED, batch=batch)


def draft_tokens(shape: ModelShape, num_bytes: int, *, batch: int) -> int:
    """Return the tokens whose `draft_bytes` fit in `num_bytes`."""
    return max(resident_tokens(shape, num_bytes, batch=batch) - MOST_DRAFTED, 0)


def fused_mlp_elements(mlp_width: int, *, gathered: int, biased: bool) -> int:
    """Elements a token occupies at the peak of an MLP whose gate and up come from one product.

    That product stays while its halves are combined: 4 widths alive instead of 3. Experts with
    biases clamp and scale both halves on the way: 9 widths.

    Args:
        mlp_width: as in `ModelShape`.
        gathered: elements copied to bring a token to its experts.
        biased: whether the experts have biases (gpt-oss).
    """
    return (9 if biased else 4) * mlp_width + gathered


def activation_bytes(
    shape: ModelShape,
    *,
    chunk_tokens: int,
    tile_heads: int,
    batch: int,
    device: str,
) -> int:
    """Peak bytes of activations while one chunk passes through the model under `generate`.

    The largest of what is alive in four phases: rotating queries, merging partials, the MLP, and
    the logits of the last token. `docs/memory-model.md` lists the tensors of each.

    Args:
        shape: the model.
        chunk_tokens: tokens of the chunk in each row.
        tile_heads: KV heads attended at once.
        batch: rows.
        device: "cpu", "cuda" or "simulated"; the last computes as the CPU does.
    """
    item, on_cpu = shape.activation_itemsize, device != "cuda"
    hidden = shape.hidden_size
    head_dim = max((layer.key_dim for layer in shape.kinds_of_layers), default=0)
    # All phases: the embedded chunk, the layer's input, its normed form, cosines and sines.
    common = (3 * hidden + 2 * head_dim) * item + _POSITION_BYTES
    phases = [(hidden + (shape.mlp_peak_elements or 3 * shape.mlp_width)) * item]
    for layer in shape.kinds_of_layers:
        if layer.kv_heads:
            query = shape.query_heads * layer.key_dim
            out = shape.query_heads * layer.value_dim
            heads = min(tile_heads, layer.kv_heads)
            # On the CPU the result of all heads at once takes the place of what was merged. CUDA's
            # figures are as they were before that.
            late = on_cpu and heads == layer.kv_heads and layer.streaming is None
            alive = (query + layer.elements_per_token + (0 if late else out)) * item
            if layer.streaming is not None:
                heads = max(heads, len(layer.streaming.heads))
                alive *= 2  # in the model's order of heads, and in that of the tracks
            merge = _merge_bytes(item, on_cpu=on_cpu)
            phases.append((4 * query + layer.elements_per_token) * item)
            phases.append(alive + int(out * heads / layer.kv_heads) * merge)
    logits = hidden * item * chunk_tokens + shape.vocab_size * (item + _FLOAT32_BYTES)
    # On the CPU torch 2.13 copies the output projection for a single 16-bit token, 2.15 does not.
    clone = shape.vocab_size * hidden * item if on_cpu and item < _FLOAT32_BYTES else 0
    tokens = batch * chunk_tokens
    fragments = 0 if on_cpu else _fragments_beyond(tokens * shape.mlp_width * item)
    return max(tokens * (common + max(phases)), batch * logits + clone) + fragments


def _fragments_beyond(tensor_bytes: int) -> int:
    """Bytes that torch's allocator holds and cannot use, more than what CUDA itself has for them.

    They grow with the MLP's tensors, here by twice what one has more than in the prefill that
    CUDA's own share was measured by. On an H100 they were 1.27 times such a tensor there, and 1.33
    times with chunks of 16K tokens. With 4/3 of it prompts in chunks of 16.5K ran out of memory.
    """
    return 2 * max(tensor_bytes - _USUAL_TENSOR_BYTES, 0)


def _merge_bytes(itemsize: int, *, on_cpu: bool) -> int:
    """Bytes for each element of a partial output while it is merged into another one.

    On the CPU these are the first partial, its float32 copy, the next partial, which is float32,
    and its weighted form. On CUDA they are the query laid out anew, five partials and, in float32,
    what is merged of four. Without Triton they are no more.
    """
    if on_cpu:
        return itemsize + 3 * _FLOAT32_BYTES
    return 6 * itemsize + _FLOAT32_BYTES
