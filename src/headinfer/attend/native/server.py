"""A thread that attends for a device's captured steps (`server.c`): asked and answered by flags.

It runs no Python. So neither an exception nor Ctrl-C in Python's threads keeps it from answering
what a step asks that is on its way.
"""

import ctypes
import functools
import os
import sys
import weakref
from collections.abc import Sequence

import torch

from headinfer.attend.native.job import Job
from headinfer.device.base import PlaceError, Stream
from headinfer.native.build import compile_kernel

_MOST_REST_S = 5

_POINTER, _NUMBER = ctypes.c_void_p, ctypes.c_int64


class AttendTask:
    """A job to be done each time a step asks.

    Args:
        job: attends; made by `Jobs.make`.
        read: what it reads, stated where that is checked.
        written: what it writes.
    """

    def __init__(
        self, job: Job, read: Sequence[torch.Tensor], written: Sequence[torch.Tensor]
    ) -> None:
        self.job = job
        self._read, self._written = read, written

    def __call__(self) -> None:
        """Do it here and now."""
        self.job()

    def state_accesses(self, stream: Stream) -> None:
        """State what it reads and writes."""
        for tensor in self._read:
            stream.reads(tensor, "attention on the host")
        for tensor in self._written:
            stream.writes(tensor, "result of the host's attention")


class FlagServer:
    """A server of flags whose tasks are jobs; see `device.base.Server`.

    Args:
        flags: `[2, tasks]` of int64 in host memory, all down; what asks, and what answers.

    Attributes:
        asks: the flags that ask.
        answers: the flags that answer.
        tasks: what is done; None where nothing is yet.
    """

    def __init__(self, flags: torch.Tensor) -> None:
        self.asks, self.answers = flags
        count = flags.shape[1]
        self.tasks: list[AttendTask | None] = [None] * count
        self._flags = flags
        self._entries, self._arguments = (_POINTER * count)(), (_POINTER * count)()
        self._address: int | None = None
        self._ending: weakref.finalize | None = None  # type: ignore[type-arg]  # not in 3.10

    def set_task(self, index: int, task: AttendTask) -> None:
        """Have a task done for a flag; only while nothing is asked."""
        self.tasks[index] = task
        self._entries[index] = ctypes.cast(task.job.entry, _POINTER).value  # type: ignore[arg-type]  # a function
        self._arguments[index] = task.job.argument

    def begin(self) -> None:
        """Begin the thread, if there is none yet.

        Raises:
            PlaceError: it cannot be had.
        """
        if self._address is not None:
            return
        library = server_library()
        if library is None:
            raise PlaceError("there is no compiled server of flags")
        flags = self.asks.data_ptr(), self.answers.data_ptr()
        self._address = library.begin_server(
            *flags, self._entries, self._arguments, len(self.tasks)
        )
        if self._address is None:
            raise PlaceError("the system grants no thread for the host's attention")
        kept = self._flags, self._entries, self._arguments
        self._ending = weakref.finalize(self, _end, os.getpid(), self._address, kept)
        self._ending.atexit = False  # a device may be waiting; the thread ends with the process

    def expect(self) -> None:
        """Wake the thread for a step that is about to ask for all tasks, in their order."""
        if self._address is not None:
            library = server_library()
            assert library is not None
            library.expect_flags(self._address)

    def rest(self) -> None:
        """Sleep until all that was expected is answered, or seconds are over as on a failure.

        A thread that waits for the device spins, which slows the attention down.
        """
        if self._address is not None:
            library = server_library()
            assert library is not None
            library.await_rest(self._address, _MOST_REST_S)

    def end(self) -> None:
        """End the thread. What still waits for an answer gets one, without the attention."""
        if self._ending is not None:
            self._ending()
        self._ending = self._address = None


def _end(process: int, address: int, _kept: object) -> None:
    """End a server's thread, unless it was lost in a fork."""
    library = server_library()
    if library is not None and process == os.getpid():
        library.end_server(address)


@functools.cache
def server_library() -> ctypes.CDLL | None:
    """Return `server.c` compiled; None where it cannot be had."""
    if sys.platform != "linux":
        return None
    library = compile_kernel(__package__, "server.c", torch.float32)
    if library is not None:
        library.begin_server.argtypes = [_POINTER, _POINTER, _POINTER, _POINTER, _NUMBER]
        library.begin_server.restype = _POINTER
        library.expect_flags.argtypes = library.end_server.argtypes = [_POINTER]
        library.await_rest.argtypes = [_POINTER, _NUMBER]
        for function in (library.expect_flags, library.end_server, library.await_rest):
            function.restype = None
    return library
