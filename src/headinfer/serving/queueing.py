"""Who waits to begin, in order of asking, and how many run at once."""

import threading
from collections import deque
from collections.abc import Callable

from headinfer.errors import DeskClosedError, QueueFullError
from headinfer.units import counted


class Line:
    """A line of requests: some run, the others wait, and no more than a limit wait.

    Args:
        running: requests that run at once.
        waiting: requests that may wait beside them.
    """

    def __init__(self, running: int, waiting: int) -> None:
        self._most_running = running
        self._most_waiting = waiting
        self._changed = threading.Condition()
        self._running: set[object] = set()
        self._waiting: deque[object] = deque()
        self._closed = False

    def enter(self, request: object) -> None:
        """Take a place at the end.

        Raises:
            QueueFullError: so many wait already.
            DeskClosedError: no request is taken any more.
        """
        with self._changed:
            if self._closed:
                raise DeskClosedError("no more requests are taken: the server is shutting down")
            full = len(self._running) + len(self._waiting)
            if full >= self._most_running + self._most_waiting:
                raise QueueFullError(
                    f"the queue is full, with {counted(len(self._running), 'request')} running and "
                    f"{len(self._waiting)} waiting; try again later"
                )
            self._waiting.append(request)
            self._begin_next()

    def wait(
        self, request: object, given_up: Callable[[], bool], on_position: Callable[[int], None]
    ) -> bool:
        """Block until a request may begin; return whether it may.

        Args:
            request: that entered.
            given_up: whether it no longer wants to; `notice` has that asked.
            on_position: told how many begin before it, when that has changed.
        """
        told: int | None = None
        while True:
            with self._changed:
                while (place := self._place(request)) == told and place is not None:
                    if given_up():
                        return False
                    self._changed.wait()
                if given_up():
                    return False
                if place is None:
                    return True
            told = place
            on_position(place)  # outside, for it may take its time

    def leave(self, request: object) -> None:
        """Give up a place, wherever it is; may be called again."""
        with self._changed:
            self._running.discard(request)
            if request in self._waiting:
                self._waiting.remove(request)
            self._begin_next()

    def notice(self) -> None:
        """Have those that wait look whether they still want to."""
        with self._changed:
            self._changed.notify_all()

    def close(self) -> None:
        """Take no more requests."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def position(self, request: object) -> int | None:
        """Return how many begin before a request that waits; None for one that does not wait."""
        with self._changed:
            return self._place(request)

    def _place(self, request: object) -> int | None:
        return self._waiting.index(request) if request in self._waiting else None

    def _begin_next(self) -> None:
        while self._waiting and len(self._running) < self._most_running:
            self._running.add(self._waiting.popleft())
        self._changed.notify_all()
