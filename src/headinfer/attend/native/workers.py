"""Threads of our own for jobs (`workers.h`), asleep between them; shared by who needs as many."""

import ctypes
import os
import threading
import weakref

_lock = threading.Lock()
_shared: "weakref.WeakValueDictionary[tuple[str, int], Workers]" = weakref.WeakValueDictionary()


class Workers:
    """A pool of threads, which end when nobody refers to it any more; made by `shared_workers`.

    Args:
        library: `job.c` compiled, whose jobs they help with.
        count: threads.

    Attributes:
        address: what jobs know them by; 0 where there are none.
    """

    def __init__(self, library: ctypes.CDLL, count: int) -> None:
        self.address: int = library.start_workers(count) or 0 if count else 0
        self._ending: weakref.finalize | None = None  # type: ignore[type-arg]  # not in 3.10
        if self.address:
            self._ending = weakref.finalize(self, library.stop_workers, self.address)
            self._ending.atexit = False  # a job may be under way; they end with the process

    def forget(self) -> None:
        """Let go of threads that are another process's."""
        self.address = 0
        if self._ending is not None:
            self._ending.detach()


def shared_workers(library: ctypes.CDLL, count: int) -> Workers:
    """Return `count` threads that help with a library's jobs: those that somebody has, if any."""
    key = library._name, count
    with _lock:
        workers = _shared.get(key)
        if workers is None:
            workers = _shared[key] = Workers(library, count)
        return workers


def _begin_anew() -> None:
    """After a fork: the child has none of its parent's threads."""
    global _lock
    _lock = threading.Lock()
    for workers in list(_shared.values()):
        workers.forget()
    _shared.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_begin_anew)
