"""What holds for every host function that a stream calls, on whichever thread."""

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def without_collection() -> Iterator[None]:
    """Keep the garbage collector from running, on any thread, until a host function is done.

    On the function's thread it might free a cache that nobody refers to any more, which waits for
    the very stream that waits for the function; or device memory, for which the allocator's lock is
    needed, whose holder may be waiting for the device.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
