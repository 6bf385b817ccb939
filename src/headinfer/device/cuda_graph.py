"""Work captured as a CUDA graph, by torch."""

import contextlib
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

import torch

from headinfer.device.base import CaptureError
from headinfer.device.host_calls import without_collection
from headinfer.device.together import Together

_Result = TypeVar("_Result")


class CudaCapture(Generic[_Result]):
    """A CUDA graph of what a function enqueues on the current stream, which must be no default one.

    It is several graphs where functions are to be called in between.

    Other threads may go on meanwhile: only this one must not do what waits for the device.
    `torch.cuda.graph` would first collect garbage and empty torch's cache, which takes longer than
    the capture.

    A graph has nodes on several devices where their compute takes part: their streams join its
    capture by events. One launch then serves all of them. What the work enqueues to move a tensor
    from device to device is captured like all else, with the waits of torch's around it.

    Args:
        pool: memory of graphs that never run at once, of `torch.cuda.graph_pool_handle`.
        together: the device whose current stream it is, and those that take part.
        pools_beside: memory of those; kept as long as the graphs.
    """

    _result: _Result

    def __init__(self, pool: Any, together: Together, pools_beside: Sequence[Any] = ()) -> None:
        self._pool = pool
        self._together = together
        self._pools_beside = pools_beside
        self._graphs: list[torch.cuda.CUDAGraph] = []
        self._asides: list[Callable[[], None]] = []  # one between each two graphs

    def record(self, work: Callable[[], _Result]) -> None:
        """Capture what a function enqueues.

        Args:
            work: called once.

        Raises:
            CaptureError: the work does what cannot be captured.
        """
        # What is collected within may wait for the device, which ends the capture.
        with without_collection():
            self._begin()
            try:
                self._together.fork()
                self._result = work()
            except BaseException as error:
                with contextlib.suppress(RuntimeError):  # the capture failed, as is known
                    self._end()
                if isinstance(error, RuntimeError):
                    raise CaptureError(_reason(error)) from error
                raise
            try:
                self._end()
            except RuntimeError as error:
                raise CaptureError(_reason(error)) from error

    def _begin(self) -> None:
        with self._together.first.in_use():
            graph = torch.cuda.CUDAGraph()
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            self._graphs.append(graph)

    def _end(self) -> None:
        with self._together.first.in_use():
            try:
                self._together.join()
            finally:
                _end(self._graphs[-1], self._pool)

    def aside(self, work: Callable[[], None]) -> None:
        """End a graph, have a function called behind it in each replay, and begin another."""
        self._end()
        self._asides.append(work)
        self._begin()
        self._together.fork()

    def replay(self) -> _Result:
        """Launch the graphs on the current stream of the device that launches."""
        for graph, aside in zip(self._graphs, self._asides, strict=False):
            self._launch(graph)
            aside()
        self._launch(self._graphs[-1])
        return self._result

    def _launch(self, graph: torch.cuda.CUDAGraph) -> None:
        self._together.join()
        try:
            graph.replay()
        finally:  # an interrupt may come behind the launch
            self._together.fork()


def _end(graph: torch.cuda.CUDAGraph, pool: Any) -> None:
    """End a capture, and have the allocator hear of it where that fails.

    Torch tells it only of captures that ended well. It would go on as during a capture, and would
    refuse all later ones into this pool.
    """
    try:
        graph.capture_end()
    except RuntimeError:
        device_index = torch.cuda.current_device()
        with contextlib.suppress(RuntimeError):  # it heard of it, and something else failed
            torch._C._cuda_endAllocateToPool(device_index, pool)
            torch._C._cuda_releasePool(device_index, pool)
        raise


def _reason(error: RuntimeError) -> str:
    """Return what torch says in its first line."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
