"""Recording the operations of torch that a function does, to be run again with their tensors."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from headinfer.device.base import CaptureError

_READ_BACK = frozenset(
    (
        *("_local_scalar_dense", "nonzero", "masked_select", "bincount", "allclose"),
        *("_unique2", "unique_dim", "unique_consecutive"),
    )
)
"""Operations whose results have sizes, or are numbers, that a GPU would have to be waited for.

`equal` is not among them: masks are looked at on the CPU, beside a GPU too.
"""

COMMUNICATES = ("c10d", "_c10d_functional")
"""Namespaces of operations that processes do together."""

_PLAIN = (torch.Tensor, torch.nn.Parameter)
"""Tensors that hold no others."""

_READ_BACK_METHODS = (torch.Tensor.tolist, torch.Tensor.numpy)
"""Methods that do so without any operation."""


class Recording(TorchDispatchMode):
    """A recording of the operations of a function; in `recorded` they are run and noted.

    Attributes:
        operations: what was noted, in order; what a function is called for stands for itself.
        in_launch: whether a function runs that is called in each replay, too.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch has no types for it
        self.operations: list[Any] = []
        self.in_launch = False

    @contextlib.contextmanager
    def recorded(self) -> Iterator[None]:
        """Have operations noted until the `with` statement ends.

        What reads a tensor back raises `CaptureError` there.
        """
        with _NoMethods(self), self:
            yield

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

    def note(
        self, operation: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        """Note an operation that was run; `output` is what it gave."""
        raise NotImplementedError

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
        self.note(operation, args, kwargs, output)
        return output


class _NoMethods(TorchFunctionMode):
    """A refusal of methods that read a tensor back."""

    def __init__(self, recording: Recording) -> None:
        super().__init__()
        self._recording = recording

    def __torch_function__(
        self,
        function: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if function in _READ_BACK_METHODS and not self._recording.in_launch:
            raise CaptureError(f"it reads back a tensor by {function.__name__}()")
        return function(*args, **(kwargs or {}))


def _chosen_by_mask(indices: Any) -> bool:
    return any(each is not None and each.dtype in (torch.bool, torch.uint8) for each in indices)
