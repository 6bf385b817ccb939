"""Sizes of chunks and tiles to choose among, from the largest to the smallest."""

from collections.abc import Iterator

from headinfer.plan.options import Options
from headinfer.plan.shape import ModelShape

MIN_CHUNK_TOKENS = 128
MIN_TILE_TOKENS = 256

ALL_TOKENS = 2**40
"""Tile size of a tile that is never split; only where tiles are views and take no memory."""

MAX_TILE_TOKENS = 2**17
"""A tile that was left to choose has no more tokens, so that staging is bounded in any context.
Keys of a head of 128 dims are then 32 MiB, beside which starting their copy is little."""

_LEAST_CONTEXT_TOKENS = 8192
"""Staging is made for at least such a context, however short the first prompt is."""

_CHUNK_CHOICES = (8192, 4096, 2048, 1024, 512, 256, MIN_CHUNK_TOKENS)
_CPU_CHUNK_TOKENS = 512

LARGE_CHUNK_TOKENS = 16384
"""A context of up to so many tokens may pass in one chunk. Longer ones may pass in such chunks
where residents of the answer have their memory. Elsewhere tokens that are resident need it."""

_TILE_TARGET_BYTES = 64 * 2**20
"""The usual tile, where nothing is known of the machine: 64 MiB take 2.5 ms at 25 GB/s."""


def chunk_sizes(options: Options, device: str, context_tokens: int | None) -> tuple[int, ...]:
    """Return the sizes of prefill chunks to try, the largest first."""
    if options.chunk_tokens != "auto":
        return (options.chunk_tokens,)
    if device == "cpu":
        return tuple(choice for choice in _CHUNK_CHOICES if choice <= _CPU_CHUNK_TOKENS)
    if context_tokens and _CHUNK_CHOICES[0] < context_tokens <= LARGE_CHUNK_TOKENS:
        return LARGE_CHUNK_TOKENS, *_CHUNK_CHOICES
    return _CHUNK_CHOICES


def tile_sizes(
    shape: ModelShape, options: Options, device: str, context_tokens: int | None
) -> Iterator[tuple[int, int]]:
    """Yield the (heads, tokens) of the usual tiles, the largest first."""
    heads_all = max(shape.kv_heads, 1)
    copies = device != "cpu"
    heads: list[int]
    if isinstance(options.tile_heads, int):
        heads = [min(options.tile_heads, heads_all)]  # where heads stream there may be fewer
    elif options.tile_heads == "all" or not copies:
        heads = [heads_all]
    else:
        heads = [heads_all] + [n for n in (8, 4, 2, 1) if n < heads_all]
    for tile_heads in heads:
        if isinstance(options.tile_tokens, int):
            yield tile_heads, options.tile_tokens
        elif not copies:
            yield tile_heads, ALL_TOKENS
        elif options.tile_tokens == "all":
            yield tile_heads, context_tokens or ALL_TOKENS
        else:
            per_token = max(shape.kv_bytes(1) // max(len(shape.full_layers), 1), 1)
            per_token = max(per_token * tile_heads // heads_all, 1)
            tokens = max(_TILE_TARGET_BYTES // per_token, MIN_TILE_TOKENS)
            tokens = min(tokens, MAX_TILE_TOKENS)
            if context_tokens is not None:  # the next turn may be longer than this one
                tokens = min(tokens, max(context_tokens, _LEAST_CONTEXT_TOKENS))
            while tokens > MIN_TILE_TOKENS:
                yield tile_heads, tokens
                tokens //= 2
            yield tile_heads, MIN_TILE_TOKENS


def other_tile_tokens(options: Options, usual_tokens: int, context_tokens: int) -> Iterator[int]:
    """Yield the tokens of tiles beside the usual: powers of two, and the whole context.

    Larger tiles are fewer to start; smaller ones leave more for tokens that are resident. Where
    nothing says how much memory there is, none is larger than the usual.
    """
    if options.tile_tokens != "auto":
        return
    largest = min(context_tokens, MAX_TILE_TOKENS)
    if options.device_memory_bytes is None:
        largest = min(largest, usual_tokens)
    tile_tokens = MIN_TILE_TOKENS
    while tile_tokens < largest:
        yield tile_tokens
        tile_tokens *= 2
    yield max(largest, MIN_TILE_TOKENS)
