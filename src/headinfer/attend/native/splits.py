"""How many parts the heads of a call are split into, so that all threads have work."""

import functools
import math

_PARTS_PER_THREAD = 8
"""Parts for each thread. Measured with 15 threads on an H100's host: as many read 123 GB/s, one 88,
and more no faster."""


@functools.lru_cache(1024)  # asked for each tile
def stealable_splits(threads: int, heads: int, most: int) -> int:
    """Return parts of each head that threads take one after another, as each is done with its last.

    There are enough of them that cores which are slower than others hardly keep those waiting.

    Args:
        threads: that share the work.
        heads: number of heads.
        most: parts of one head that are worth it; one is made in any case.
    """
    wanted = -(-_PARTS_PER_THREAD * threads // heads) if threads > 1 else 1
    return min(wanted, max(most, 1))


def even_splits(threads: int, heads: int, most: int) -> int:
    """Return as few parts of each head as give every thread the same number; see above."""
    return min(threads // math.gcd(threads, heads), max(most, 1))
