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
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from headinfer.device.base import CaptureError
from headinfer.device.together import Together

if TYPE_CHECKING:
    from headinfer.device.simulated import SimulatedDevice

_Result = TypeVar("_Result")

_READ_BACK = frozenset(
    (
        *("_local_scalar_dense", "nonzero", "masked_select", "bincount", "allclose"),
        *("_unique2", "unique_dim", "unique_consecutive"),
    )
)
"""Operations whose results have sizes, or are numbers, that a GPU would have to be waited for.

`equal` is not among them: masks are looked at on the CPU, beside a GPU too.
"""

_COMMUNICATES = ("c10d", "_c10d_functional")
"""Namespaces of operations that processes do together."""

_PLAIN = (torch.Tensor, torch.nn.Parameter)
"""Tensors that hold no others."""

_READ_BACK_METHODS = (torch.Tensor.tolist, torch.Tensor.numpy)
"""Methods that do so without any operation."""


class Recorder(TorchDispatchMode):
    """A recorder of the operations of a function; `with` it, they are run and noted.

    Args:
        origins: the streams that take part from the beginning until the end. Another one takes part
            in the capture from when it waits for one that does.

    Attributes:
        operations: what runs them again, in order.
        in_launch: whether a function runs that is called in each replay, too.
    """

    def __init__(self, origins: Iterable[object]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch has no types for it
        self.operations: list[Callable[[], object]] = []
        self.in_launch = False
        self._origins = frozenset(origins)
        self._taking_part = set(self._origins)
        self._open: set[object] = set()  # streams with work that no origin waited for

    def note(self, stream: object, work: Callable[[], object]) -> None:
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

    def launch(self, work: Callable[[], None]) -> None:
        """Run a function, and note it as one operation that looks at contents when it runs."""
        self.operations.append(work)
        self.in_launch = True
        try:
            work()
        finally:
            self.in_launch = False

    def aside(self, work: Callable[[], None]) -> None:
        """Note a function that is called at each replay, and not now."""
        self.operations.append(work)

    def __torch_dispatch__(
        self,
        operation: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run an operation, and note it."""
        kwargs = kwargs or {}
        if any(each not in _PLAIN for each in types):  # what they do with those inside comes next
            return NotImplemented
        if self.in_launch or operation.namespace == "profiler":
            return operation(*args, **kwargs)
        if torch.is_inference_mode_enabled():  # where operations made of others come whole
            with self:
                output = operation.decompose(*args, **kwargs)
            if output is not NotImplemented:
                return output
        name = operation._schema.name.split("::")[-1]
        if name in _READ_BACK or (name == "index" and _chosen_by_mask(args[1])):
            raise CaptureError(f"it reads back what {name} gives")
        output = operation(*args, **kwargs)
        if operation.namespace in _COMMUNICATES:
            self.operations.append(
                functools.partial(_communicate_again, operation, args, kwargs, output)
            )
            return output
        noted = pytree.tree_map_only(torch.Tensor, torch.Tensor.detach, (args, kwargs, output))
        self.operations.append(functools.partial(_run_again, operation, *noted))
        return output


class _NoMethods(TorchFunctionMode):
    """A refusal of methods that read a tensor back."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self._recorder = recorder

    def __torch_function__(
        self,
        function: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if function in _READ_BACK_METHODS and not self._recorder.in_launch:
            raise CaptureError(f"it reads back a tensor by {function.__name__}()")
        return function(*args, **(kwargs or {}))


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
        with _NoMethods(recorder), recorder:
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


def _chosen_by_mask(indices: Any) -> bool:
    return any(each is not None and each.dtype in (torch.bool, torch.uint8) for each in indices)


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


def _run_again(operation: Any, args: Any, kwargs: Any, outputs: Any) -> None:
    """Run an operation again, and put into its outputs what came out."""
    results = operation(*args, **kwargs)
    for output, result in zip(
        pytree.tree_leaves(outputs), pytree.tree_leaves(results), strict=True
    ):
        # Where they share memory, as views and what is done in place, it is there already.
        if isinstance(output, torch.Tensor) and output.data_ptr() != result.data_ptr():
            output.copy_(result)
