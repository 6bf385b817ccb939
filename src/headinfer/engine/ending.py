"""Waiting for work in flight when its memory goes: at any time, and when the interpreter ends."""

import _thread
import atexit
import contextlib
import time
import weakref
from collections.abc import Callable
from typing import Protocol

_DELAY_S = 0.05
"""After which a `__del__` has returned: an exception does not get out of one."""


class Settles(Protocol):
    """An owner of memory whose work in flight can be waited for."""

    def settle(self) -> None:
        """Wait until no work touches its memory; may be called again."""


_alive: "weakref.WeakSet[Settles]" = weakref.WeakSet()


def settle_at_exit(owner: Settles) -> None:
    """Have something settled before the interpreter ends, if it is still there.

    What is freed later finds modules half gone, and cannot wait.
    """
    _alive.add(owner)


@atexit.register
def _settle_all() -> None:
    for owner in list(_alive):
        with contextlib.suppress(Exception):  # of a device that failed: nobody is left to hear
            uninterrupted(owner.settle)


def uninterrupted(work: Callable[[], None]) -> None:
    """Call a function to its end, again where Ctrl-C breaks it off, which is heard afterwards.

    In a `__del__` it would be lost, and memory freed that work in flight still touches.
    """
    interrupted = False
    while True:
        try:
            work()
            break
        except KeyboardInterrupt:
            interrupted = True
    if interrupted:
        _thread.start_new_thread(_interrupt, ())


def _interrupt() -> None:
    time.sleep(_DELAY_S)
    _thread.interrupt_main()
