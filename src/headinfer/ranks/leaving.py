"""How a process that is one of several ranks ends."""

import contextlib
import os
import sys
from typing import NoReturn


def leave_at_once(code: int) -> NoReturn:
    """End the process as one that failed: others may still wait for it in a library.

    Args:
        code: the exit code.
    """
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    os._exit(code)


def leave_together() -> NoReturn:
    """End the process as one that has done its part, once all ranks have.

    The group is not destroyed: captured steps hold it, and may be waited for.
    """
    from torch import distributed

    distributed.barrier()
    leave_at_once(0)
