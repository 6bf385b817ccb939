"""Whether a prompt's kernels are being launched: what holds launches up waits meanwhile."""

import contextlib
import threading
import time
from collections.abc import Iterator

_LONGEST_S = 1.0
"""Seconds that others wait for one chunk's launches, which may take long, or fail unseen."""


class Launches:
    """A state of the process: whether one of its threads launches a prompt's kernels.

    That thread should be ahead of its devices. Whoever would hold it up waits for its next pause,
    in which it waits itself.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._thread: int | None = None
        self._until_s = 0.0

    @contextlib.contextmanager
    def under_way(self) -> Iterator[None]:
        """Launch within the block, on this thread."""
        before, self._thread = self._thread, threading.get_ident()  # it may be another's turn
        self._renew()
        try:
            yield
        finally:
            self._let_others()
            self._thread = before

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Let others go on within the block; without effect on a thread that launches nothing."""
        if self._thread != threading.get_ident():
            yield
            return
        self._let_others()
        try:
            yield
        finally:
            self._renew()

    def wait(self) -> None:
        """Block until no other thread launches, or one has launched for long without a pause."""
        with self._changed:
            while (left_s := self._until_s - time.monotonic()) > 0:
                if self._thread == threading.get_ident():
                    return
                self._changed.wait(left_s)

    def _renew(self) -> None:
        self._until_s = time.monotonic() + _LONGEST_S

    def _let_others(self) -> None:
        with self._changed:
            self._until_s = 0.0
            self._changed.notify_all()


launches = Launches()
"""The process's: a driver serves all of its threads."""
