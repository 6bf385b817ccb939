"""What the first attention on a GPU needs whatever it attends, prepared beside the caller."""

import functools
import logging
import threading

_logger = logging.getLogger(__name__)


@functools.cache
def begin_preparing() -> threading.Thread:
    """Begin to import and to identify Triton on a thread of its own; only the first call does.

    Whoever launches a program of Triton's meanwhile waits for as long as that takes.

    Returns:
        The thread. A process that ends waits for it, a second at most.
    """
    thread = threading.Thread(target=_prepare, name="headinfer-triton")
    thread.start()
    return thread


def _prepare() -> None:
    try:
        from headinfer.native.triton_launch import identify_triton  # not every system has Triton

        identify_triton()
    except Exception as error:  # who needs it will be told
        _logger.info("no Triton: %s", error)
