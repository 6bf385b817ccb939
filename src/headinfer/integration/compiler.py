"""torch's compiler, imported in the background before the first step that needs it.

It begins while the device computes the last chunk of a long prompt, and else with the first step.
Before, it would compete with the caller's thread for the interpreter, and first tokens would come
later: also those of prompts without any step. For the same reason it stops, between two modules,
while a prompt is launched.

Measured beside an H100: the second token of a process took 7.9 s, and 1.2 s where the compiler had
been imported. With an import behind each prompt's only chunk, the four next prompts of 1K tokens
took 0.6 to 1.8 s instead of 0.13. A prompt of 1K took 1.1 s beside the import, and 0.07 without.
"""

import contextlib
import functools
import importlib
import importlib.abc
import importlib.machinery
import sys
import threading
import time
import types
from collections.abc import Iterator, Sequence

from headinfer.device.launches import launches

_THREAD = "headinfer-compiler-import"

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


class _HeldLoader(importlib.machinery.SourceFileLoader):
    """A loader whose modules wait for launches before they run, with no lock but their own."""

    def exec_module(self, module: types.ModuleType) -> None:
        """Run the module's code."""
        launches.wait()
        super().exec_module(module)


class _HeldModules(importlib.abc.MetaPathFinder):
    """A finder of what one thread imports, in the usual places; made on that thread."""

    def __init__(self) -> None:
        self._thread = threading.get_ident()

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """Return a module's spec; None for other threads, and for what is not Python code."""
        if threading.get_ident() != self._thread:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        loader = None if spec is None else spec.loader
        if spec is None or type(loader) is not importlib.machinery.SourceFileLoader:
            return None
        spec.loader = _HeldLoader(loader.name, loader.path)
        return spec


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
    thread = threading.Thread(target=_import_all, name=_THREAD)
    thread.start()
    return thread


def await_import() -> None:
    """Wait for the import to end, if it has begun: until then it slows down what is launched."""
    for thread in threading.enumerate():
        if thread.name == _THREAD:
            thread.join()


def _import_all() -> None:
    finder = _HeldModules()
    sys.meta_path.insert(0, finder)
    try:
        with _yielding():
            for module in _MODULES:
                if not threading.main_thread().is_alive():
                    return
                with contextlib.suppress(Exception):
                    importlib.import_module(module)
    finally:
        with contextlib.suppress(ValueError):  # whoever took it out
            sys.meta_path.remove(finder)


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
