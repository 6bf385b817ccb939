"""Binary codebooks: words of a class as +-1 vectors that are pairwise far apart."""

from itertools import count


def codebook(size: int, length: int, distance: int) -> list[list[float]]:
    """Make a lexicographic code: the first words that keep their distance to all before them.

    Args:
        size: How many vectors.
        length: Entries of each vector.
        distance: Least number of entries in which any two vectors differ in sign.

    Returns: `size` vectors with entries +-1/sqrt(length). Two different ones have a dot product of
        at most `1 - 2 * distance / length`.

    Raises:
        ValueError: There are not so many code words of this length and distance.
    """
    words: list[int] = []
    for word in count():
        if len(words) == size:
            break
        if word >> length:
            raise ValueError(
                f"no {size} code words of {length} bits at distance {distance}: only {len(words)}"
            )
        if all((word ^ other).bit_count() >= distance for other in words):
            words.append(word)
    unit = length**-0.5
    return [[unit if word >> bit & 1 else -unit for bit in range(length)] for word in words]
