"""Random numbers for code that draws from the generators of modules, put back afterwards."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np


@contextmanager
def seeded(name: str) -> Iterator[random.Random]:
    """Let Python's and numpy's common generators draw what a name stands for.

    Args:
        name: of what is drawn. The same name gives the same numbers.

    Yields:
        A generator for those that have one of their own, such as modules of the harness.
    """
    python, numpy = random.getstate(), np.random.get_state()
    drawn = random.Random(name)
    random.seed(drawn.getrandbits(64))
    np.random.seed(drawn.getrandbits(32))
    try:
        yield drawn
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
