"""How far a run is whose rows are texts of several lengths, and the time left."""

import time
from collections.abc import Callable, Sequence
from typing import Protocol

_EVEN_TOKENS = 16 * 1024
"""Tokens of a text whose attention is reckoned to take as long as the rest of it."""


class Progress(Protocol):
    """A view of a run that a person has."""

    def started(self, what: str, left_s: float | None) -> None:
        """Show that a row begins."""

    def moved(self, what: str, left_s: float | None) -> object:
        """Show how far it came."""

    def finished(self, what: str, outcome: str) -> None:
        """Show how it ended."""


class Pace:
    """A guess of the seconds left, from the work done so far and the time it took.

    Args:
        row_tokens: tokens of each row, in the order of the rows.
        clock: for tests.
    """

    def __init__(
        self, row_tokens: Sequence[int], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._clock = clock
        self._started_s = clock()
        self._left = sum(map(_work, row_tokens))
        self._done = 0.0

    def left_s(self, row_tokens: int = 0) -> float | None:
        """Return the seconds left; None before anything is done.

        Args:
            row_tokens: tokens done of the row that runs.
        """
        done = self._done + _work(row_tokens)
        if not done:
            return None
        seconds = self._clock() - self._started_s
        return seconds / done * max(0.0, self._left - _work(row_tokens))

    def finish(self, row_tokens: int, *, ran: bool) -> None:
        """Count a row as finished.

        Args:
            row_tokens: its tokens.
            ran: whether it did. The work of a row that cannot run says nothing of the others.
        """
        self._left -= _work(row_tokens)
        if ran:
            self._done += _work(row_tokens)


def _work(tokens: int) -> float:
    return tokens * (1 + tokens / _EVEN_TOKENS)
