"""Captures of the simulated device: operations of torch, run again with the tensors they had.

Nothing of Python runs again, as with a CUDA graph. Numbers that Python had are those of the
capture. Weights are where they were, and results come into the same memory. What reads a tensor's
contents back is refused. Unlike those of a CUDA graph, compute's operations run while they are
recorded. What is enqueued on other streams runs in replays alone.
"""

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch
from torch.utils import _pytree as pytree

from headinfer.device.base import CaptureError
from headinfer.device.recording import COMMUNICATES, Recording
from headinfer.device.together import Together

if TYPE_CHECKING:
    from headinfer.device.simulated import SimulatedDevice

_Result = TypeVar("_Result")


class Recorder(Recording):
    """A recording of what a function enqueues on streams that take part in a capture.

    Args:
        origins: the streams that take part from the beginning until the end. Another one takes part
            in the capture from when it waits for one that does.

    """

    def __init__(self, origins: Iterable[object]) -> None:
        super().__init__()
        self._origins = frozenset(origins)
        self._taking_part = set(self._origins)
        self._open: set[object] = set()  # streams with work that no origin waited for

    def note_enqueued(self, stream: object, work: Callable[[], object]) -> None:
        """Note what is enqueued on a stream.

        Raises:
            CaptureError: the stream takes no part in the capture.
        """
        if stream not in self._taking_part:
            raise CaptureError("it enqueues work on a stream that takes no part in it")
        if stream not in self._origins:
            self._open.add(stream)
        self.operations.append(work)

    def join(self, stream: object, other: object) -> None:
        """Note that a stream waits for all that another one has enqueued by now."""
        self._taking_part.add(stream)
        if stream in self._origins:
            self._open.discard(other)

    def check_joined(self) -> None:
        """Refuse a capture whose end does not wait for all of it.

        Raises:
            CaptureError: a stream's part is not waited for.
        """
        if self._open:
            raise CaptureError("its end does not wait for all streams that take part")

    def note(
        self, operation: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        """Note an operation that was run; see `Recording.note`."""
        if operation.namespace in COMMUNICATES:
            again = functools.partial(_communicate_again, operation, args, kwargs, output)
        else:
            if operation.is_view:  # of memory that stays where it is
                return
            args, kwargs, output = pytree.tree_map_only(
                torch.Tensor, torch.Tensor.detach, (args, kwargs, output)
            )
            again = functools.partial(_run_again, operation, args, kwargs, _leaves(output))
        self.operations.append(again)


class SimulatedCapture(Generic[_Result]):
    """A capture of what a function does with torch.

    Args:
        work: called once.
        recorder: a new one.
        launches: where the operations run.

    Raises:
        CaptureError: the work reads something back.
    """

    def __init__(
        self, work: Callable[[], _Result], recorder: Recorder, launches: "SimulatedLaunches"
    ) -> None:
        with recorder.recorded():
            self._result = work()
        recorder.check_joined()
        self._operations = recorder.operations
        self._launches = launches

    def replay(self) -> _Result:
        """Run the operations again, into the memory that their results have."""
        with torch.no_grad(), self._launches.launch():
            for run in self._operations:
                run()
        return self._result


class SimulatedLaunches:
    """A way of devices into a capture's launches, and out of them between two.

    In a launch compute of those that take part is another stream: the graph's part of it. Nothing
    but the device that launches orders what the two do.

    Args:
        together: the devices.
        others: those that take part.
    """

    def __init__(self, together: Together, others: "Sequence[SimulatedDevice]") -> None:
        self._together, self._others = together, others

    @contextlib.contextmanager
    def launch(self) -> Iterator[None]:
        """Have what is done in the `with` statement be a launch's."""
        self._cross(into_graph=True)
        try:
            yield
        finally:
            self._cross(into_graph=False)

    def aside(self, work: Callable[[], None]) -> Callable[[], None]:
        """Return what calls a function between two launches, from within."""

        def between() -> None:
            self._cross(into_graph=False)
            try:
                work()
            finally:
                self._cross(into_graph=True)

        return between if self._others else work

    def _cross(self, *, into_graph: bool) -> None:
        self._together.join()
        for device in self._others:
            device.move_compute(into_graph=into_graph)
        self._together.fork()


def _communicate_again(operation: Any, args: Any, kwargs: Any, outputs: Any) -> None:
    """Run an operation of several processes again, and wait until what came out is there."""
    results = operation(*args, **kwargs)
    for output, result in zip(
        pytree.tree_leaves(outputs), pytree.tree_leaves(results), strict=True
    ):
        if hasattr(result, "wait"):
            result.wait()
        elif isinstance(output, torch.Tensor) and output.data_ptr() != result.data_ptr():
            output.copy_(torch.ops._c10d_functional.wait_tensor(result))


def _leaves(output: Any) -> Sequence[Any]:
    return (output,) if isinstance(output, torch.Tensor) else pytree.tree_leaves(output)


def _run_again(operation: Any, args: Any, kwargs: Any, outputs: Sequence[Any]) -> None:
    """Run an operation again, and put into its outputs what came out."""
    results = operation(*args, **kwargs)
    for output, result in zip(outputs, _leaves(results), strict=True):
        # Where they share memory, as views and what is done in place, it is there already.
        if isinstance(output, torch.Tensor) and output.data_ptr() != result.data_ptr():
            output.copy_(result)
