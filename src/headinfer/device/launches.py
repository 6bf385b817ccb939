"""Whether a prompt's kernels are being launched: what holds launches up waits meanwhile."""

import contextlib
import threading
import time
from collections.abc import Iterator

_LONGEST_S = 1.0
"""Seconds that others wait for one chunk's launches, which may take long, or fail unseen."""


class Launches:
    """A state of the process: which of its threads launch a prompt's kernels.

    Such a thread should be ahead of its devices. Whoever would hold it up waits for its next pause,
    in which it waits itself.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._until_s: dict[int, float] = {}  # by thread: when others wait no more for it

    @contextlib.contextmanager
    def under_way(self) -> Iterator[None]:
        """Launch within the block, on this thread; blocks do not nest."""
        thread = threading.get_ident()
        try:
            self._set(thread, time.monotonic() + _LONGEST_S)
            yield
        finally:
            self._set(thread, None)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Let others go on within the block; without effect on a thread that launches nothing."""
        thread = threading.get_ident()
        if thread not in self._until_s:
            yield
            return
        self._set(thread, 0.0)
        try:
            yield
        finally:
            self._set(thread, time.monotonic() + _LONGEST_S)

    def wait(self) -> None:
        """Block until no other thread launches, or each has launched for long without a pause."""
        own = threading.get_ident()
        with self._changed:
            while True:
                others = [until_s for thread, until_s in self._until_s.items() if thread != own]
                left_s = max(others, default=0.0) - time.monotonic()
                if left_s <= 0:
                    return
                self._changed.wait(left_s)

    def _set(self, thread: int, until_s: float | None) -> None:
        with self._changed:
            if until_s is None:
                self._until_s.pop(thread, None)
            else:
                self._until_s[thread] = until_s
            self._changed.notify_all()


launches = Launches()
"""The process's: a driver serves all of its threads."""
