"""torch's compiler, imported in the background before the first step that needs it.

It begins while the device computes the last chunk of a long prompt, and else with the first step.
Before, it would compete with the caller's thread for the interpreter, and first tokens would come
later: also those of prompts without any step.

Measured beside an H100: the second token of a process took 7.9 s, and 1.2 s where the compiler had
been imported. With an import behind each prompt's only chunk, the four next prompts of 1K tokens
took 0.6 to 1.8 s instead of 0.13.
"""

import contextlib
import functools
import importlib
import sys
import threading
import time
from collections.abc import Iterator

_MODULES = (
    *("torch._dynamo", "torch._higher_order_ops", "torch._functorch.aot_autograd"),
    *("torch._inductor.decomposition", "torch._inductor.lowering", "torch._inductor.compile_fx"),
)
"""What is imported, in parts: the process ends between two of them, not within one."""

_SWITCH_S = 1e-5
"""How long a thread that wants the interpreter waits for this one meanwhile; Python's own is 5 ms.

A thread that launches kernels gives the interpreter up at each, and wants it back.

Measured beside an H100 with 0.5 ms: a prompt that takes 0.4 s to launch took 3.2 to 4.4 s more. On
a CPU, small operations took 2.6 times their time with 5 ms, and 1.3 times with this. The import
took no longer.
"""

_LONG_CHUNK_S = 2.0
"""Seconds of a chunk in which the device hides that the next ones are launched slowly.

Measured beside an H100: chunks took 1.2 to 1.8 s to launch while the compiler was imported.
"""


class CompilerImport:
    """A choice of the chunk behind which the import begins."""

    def __init__(self) -> None:
        self._launched_s: float | None = None  # when a chunk was, by the clock

    def chunk_launched(self, *, more: bool) -> None:
        """Begin it if the device has work to do for long enough.

        Args:
            more: whether another chunk comes. Then it begins where one takes long. Behind the last
                of several it begins in any case.
        """
        now_s = time.monotonic()
        before_s, self._launched_s = self._launched_s, now_s if more else None
        if before_s is not None and not (more and now_s - before_s < _LONG_CHUNK_S):
            begin_import()


@functools.cache
def begin_import() -> threading.Thread:
    """Begin to import the compiler on a thread of its own; only the first call does.

    The thread holds the process's end up for one module at most. What it fails with is left for
    the caller who needs the compiler.

    Returns:
        The thread, to be joined before anything is compiled: two threads that import the same
        modules might see parts of them.
    """
    thread = threading.Thread(target=_import_all, name="headinfer-compiler-import")
    thread.start()
    return thread


def _import_all() -> None:
    with _yielding():
        for module in _MODULES:
            if not threading.main_thread().is_alive():
                return
            with contextlib.suppress(Exception):
                importlib.import_module(module)


@contextlib.contextmanager
def _yielding() -> Iterator[None]:
    """Have threads give the interpreter up soon, in the whole process, until the block ends."""
    before_s = sys.getswitchinterval()
    sys.setswitchinterval(min(_SWITCH_S, before_s))
    ours_s = sys.getswitchinterval()
    try:
        yield
    finally:
        if sys.getswitchinterval() == ours_s:  # else somebody has set another meanwhile
            sys.setswitchinterval(before_s)
