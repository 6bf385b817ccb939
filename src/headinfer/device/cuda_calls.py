"""Calls of host functions in a CUDA stream's order, by the driver's `cuLaunchHostFunc`.

torch has no binding for it. The driver calls on a thread of its own, which needs Python's global
lock; so nobody may wait for the device while holding that. torch's and Triton's waits and launches
release it, and so does ctypes. An object that is freed meanwhile may launch too (an allocator's
event), with the lock held. A launch waits where the driver's queue, of about a thousand, is full.

So few calls may be pending at a time, which keeps the queue short where layers have few tiles.
Functions in machine code need no lock, and so no limit.
"""

import atexit
import contextlib
import ctypes
import itertools
import threading
from collections.abc import Callable

import torch

from headinfer.device.cuda_driver import launch_host_function
from headinfer.device.host_calls import NativeFunction, without_collection

MAX_PENDING_CALLS = 4
"""To be a few layers ahead hides all launching."""

_POLL_S = 1.0

_pending: dict[int, Callable[[], None]] = {}
_numbers = itertools.count(1)
_room = threading.Semaphore(MAX_PENDING_CALLS)
_devices: set[torch.device] = set()
_exiting = False


def _call(number: int) -> None:
    """Call what was enqueued under a number; ctypes reports an error that gets here."""
    try:
        with without_collection():
            if (function := _pending.pop(number, None)) is not None:
                function()
    finally:
        _room.release()


_Callback = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
_callback = _Callback(_call)  # one for all calls, so that none is freed while it runs


def enqueue_call(stream: torch.cuda.Stream, function: Callable[[], None]) -> None:
    """Have a function called once all work so far on a stream is done; later work waits for it.

    Returns at once, unless `MAX_PENDING_CALLS` of the process are pending: then waits for one. A
    `NativeFunction` never waits.

    Args:
        stream: of the device that is current.
        function: see `Stream.run`; referred to until it ran, unless it is a `NativeFunction`.

    Raises:
        RuntimeError: the driver refuses, or the interpreter is about to end.
    """
    if isinstance(function, NativeFunction):
        _launch(stream, function.entry, function.argument)
        return
    while not _room.acquire(timeout=_POLL_S):
        stream.query()  # raises where the device has failed, so that nothing is called any more
    number = next(_numbers)
    try:
        _pending[number] = function
        _launch(stream, _callback, number)
    except BaseException:
        _pending.pop(number, None)
        _room.release()
        raise


def _launch(stream: torch.cuda.Stream, entry: Callable[[int], None], argument: int) -> None:
    """Enqueue the call of a function of ctypes'."""
    if _exiting:
        raise RuntimeError("the interpreter is about to end: nothing can be enqueued")
    _devices.add(stream.device)
    launch_host_function(stream, entry, argument)


@atexit.register
def _finish_calls() -> None:
    """Wait for what is pending: a thread that comes back to an interpreter gone would hang.

    And memory goes with the interpreter, also that which machine code works on.
    """
    global _exiting
    _exiting = True
    for device in _devices:
        with contextlib.suppress(RuntimeError):  # of a device that failed
            torch.cuda.synchronize(device)
