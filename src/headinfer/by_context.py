"""What was measured at some contexts, for what begins at about the same ones.

What a pass takes is the machine's and the model's, and changes with the context alone. So what one
cache measured is where another one of the same attachment may begin.
"""

import threading
from collections.abc import Hashable
from typing import Generic, TypeVar

_NEAR_DIVISOR, _NEAR_TOKENS = 5, 1024
"""How far apart two contexts are at the most that have about the same times: a fifth of the longer
one, or so many tokens. Below some thousand tokens weights are most of what a step reads."""

_MOST_KEPT = 16

T = TypeVar("T")


class ByContext(Generic[T]):
    """A list of the newest things that were measured, which any thread may use.

    Each is of somebody and of one context.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kept: list[tuple[Hashable, int, T]] = []  # the newest first

    def find(self, who: Hashable, tokens: int) -> T | None:
        """Return what was measured last near a context; None where nothing was.

        Args:
            who: equal for those that measure alike.
            tokens: of the context.
        """
        with self._lock:
            for other, at, measured in self._kept:
                if other == who and _are_near(at, tokens):
                    return measured
        return None

    def keep(self, who: Hashable, tokens: int, measured: T) -> None:
        """Keep what was measured, in place of what was kept near its context."""
        with self._lock:
            others = [
                kept for kept in self._kept if kept[0] != who or not _are_near(kept[1], tokens)
            ]
            self._kept = [(who, tokens, measured), *others][:_MOST_KEPT]


def _are_near(one: int, other: int) -> bool:
    """Whether passes take about the same with two numbers of tokens before them."""
    return abs(one - other) <= max(_NEAR_TOKENS, max(one, other) // _NEAR_DIVISOR)
