"""What holds for every host function that a stream calls, on whichever thread."""

import contextlib
import ctypes
import gc
import threading
from collections.abc import Callable, Iterator

from headinfer.native.threads import take_torchs_threads

_lock = threading.Lock()
_running = 0  # host functions, on all threads
_was_enabled = True


def address_of(function: Callable[..., None]) -> int | None:
    """Return where the machine code of a function of ctypes' is."""
    return ctypes.cast(function, ctypes.c_void_p).value  # type: ignore[arg-type]


class NativeFunction:
    """A host function in machine code: it needs neither Python nor its lock.

    A stream does not refer to it: who enqueues it keeps it, and all it uses, until it ran.

    Args:
        entry: a function of ctypes' that takes an address and returns nothing.
        argument: the address it is given.
        in_team: the same function of ctypes' for threads that stay awake: it takes the address of a
            `struct team` (`team.h`), too. None where there is none.
    """

    __slots__ = ("argument", "entry", "in_team")

    def __init__(
        self,
        entry: Callable[[int], None],
        argument: int,
        in_team: Callable[[int, int], None] | None = None,
    ) -> None:
        self.entry = entry
        self.argument = argument
        self.in_team = in_team

    @property
    def address(self) -> int | None:
        """Where the machine code is."""
        return address_of(self.entry)

    def __call__(self) -> None:
        """Call it here and now."""
        take_torchs_threads()
        self.entry(self.argument)


@contextlib.contextmanager
def without_collection() -> Iterator[None]:
    """Keep the garbage collector from running, on any thread, until a host function is done.

    On the function's thread it might free a cache that nobody refers to any more. Freeing a cache
    waits for the very stream that waits for the function. It might also free device memory: the
    allocator's lock is needed for that, and its holder may be waiting for the device.
    """
    global _running, _was_enabled
    with _lock:
        if not _running:
            _was_enabled = gc.isenabled()
            gc.disable()
        _running += 1
    try:
        yield
    finally:
        with _lock:
            _running -= 1
            if not _running and _was_enabled:
                gc.enable()
