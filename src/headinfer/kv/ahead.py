"""How much host memory a layer gets, and in which pieces, ahead of need. Pure arithmetic."""

from collections.abc import Iterator

_LEAST_GROWTH_TOKENS = 256
_GROWTH_DIVISOR = 8
"""Host memory that nobody reserved grows by an eighth, so at most 12.5% of a cache is unused."""

_PIECE_DIVISOR = 2
"""A piece has half as many tokens as all before it, or those of a chunk. So a layer has few pieces,
and few tiles, which never cross pieces. Yet no chunk waits long for memory that later ones fill.

Measured beside H100s: to commit and lock 1 GiB takes some 0.2 s, in which one computes as much KV
of Llama-3-8B. With pieces of three times all before them, the third of 13 chunks took 1.1 s to
launch, and later ones took 0.1.
"""


def missing_tokens(capacity: int, tokens: int) -> int:
    """Return the tokens that memory is to grow by: exactly what is missing the first time.

    A layer that outgrows its host memory grows by an eighth at least. So one token at a time does
    not make an extent, and so a tile, of each.

    Args:
        capacity: tokens that there is memory for.
        tokens: that there is to be memory for.
    """
    missing = max(tokens - capacity, 0)
    if not missing or not capacity:
        return missing
    return max(missing, capacity // _GROWTH_DIVISOR, _LEAST_GROWTH_TOKENS)


def pieces_ahead(
    tokens: int, *, chunk_tokens: int, tile_tokens: int, most_tokens: int
) -> Iterator[int]:
    """Yield the tokens of each piece, in order, so that a prompt's first chunk waits for little.

    Args:
        tokens: of all pieces.
        chunk_tokens: of a prefill chunk, for which the first piece is.
        tile_tokens: of a tile. Pieces grow to this size at least.
        most_tokens: of a piece otherwise.
    """
    most, done = max(most_tokens, tile_tokens), 0
    while done < tokens:
        piece = min(max(done // _PIECE_DIVISOR, chunk_tokens), most)
        if tokens - done - piece < chunk_tokens:
            piece = tokens - done  # what would be left is not worth a piece
        yield piece
        done += piece
