"""Captures on the CPU: operations of torch as a flat list, run again into the memory they had.

No code of the model runs again: no modules, no hooks. What a tape can do has no Python at all. A
step of a small model takes as long in Python as it takes to read the weights.
"""

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Generic, TypeVar

import torch
from torch.utils import _pytree as pytree

from headinfer.device.base import CaptureError
from headinfer.device.elementwise import Noted, elementwise
from headinfer.device.host_calls import NativeFunction
from headinfer.device.recording import COMMUNICATES, Recording
from headinfer.device.tape import Elementwise, Tape, tape_library
from headinfer.native.threads import take_torchs_threads

_Result = TypeVar("_Result")

_EMPTY = frozenset(
    ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "empty_permuted")
)
"""Operations that give memory with anything in it."""


_HALF = torch.bfloat16
"""What a tape is compiled for where nothing of it is in 16 bits."""


class CpuRecording(Recording):
    """A recording of operations that are run again on the CPU.

    Parts that torch compiles run as they are written meanwhile: what is compiled is no operation.
    """

    @contextlib.contextmanager
    def recorded(self) -> Iterator[None]:
        """See `Recording.recorded`."""
        with torch.compiler.set_stance("force_eager"), super().recorded():
            yield

    def note(
        self, operation: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        """Note an operation that was run; see `Recording.note`."""
        if operation.namespace in COMMUNICATES:
            raise CaptureError("it communicates with other processes")
        if not _leaves_all(operation, args, kwargs, output):
            noted = pytree.tree_map_only(torch.Tensor, torch.Tensor.detach, (args, kwargs, output))
            self.operations.append(Noted(operation, *noted))


class CpuCapture(Generic[_Result]):
    """A capture of what a function does with torch.

    Args:
        work: called once.
        recording: a new one.

    Raises:
        CaptureError: the work reads something back.
    """

    def __init__(self, work: Callable[[], _Result], recording: CpuRecording) -> None:
        with recording.recorded():
            self._result = work()
        self._calls = tuple(_calls(recording.operations))

    def replay(self) -> _Result:
        """Run the operations again, into the memory that their results have."""
        take_torchs_threads()
        with torch.no_grad():
            for call in self._calls:
                call()
        return self._result


def _calls(noted: Iterable[Noted | Callable[[], object]]) -> Iterator[Callable[[], object]]:
    """Yield what does all that was noted: tapes, as long as they can be, and what lies between."""
    run: list[Elementwise | NativeFunction] = []
    half: torch.dtype | None = None
    for each in noted:
        parts = _taped(each)
        halves = {part.half for part in parts if isinstance(part, Elementwise)} - {None}
        if run and (not parts or (half is not None and halves - {half})):
            yield _tape(run, half)
            run, half = [], None
        half = next(iter(halves), half)
        run += parts
        if not parts:
            yield _again(each) if isinstance(each, Noted) else each
    if run:
        yield _tape(run, half)


def _taped(noted: Noted | Callable[[], object]) -> list[Elementwise | NativeFunction]:
    """Return what a tape does for something that was noted; nothing where it does not do it."""
    parts: list[Elementwise | NativeFunction] = []
    if isinstance(noted, Noted):
        parts += elementwise(noted) or []
    elif isinstance(noted, NativeFunction) and noted.in_team is not None:
        parts.append(noted)
    halves = {part.half or _HALF for part in parts if isinstance(part, Elementwise)} or {_HALF}
    # Not all compilers know float16.
    return [] if any(tape_library(half) is None for half in halves) else parts


def _tape(run: list[Elementwise | NativeFunction], half: torch.dtype | None) -> Tape:
    library = tape_library(half or _HALF)
    assert library is not None
    return Tape(library, run)


def _leaves_all(operation: Any, args: Any, kwargs: Any, output: Any) -> bool:
    """Whether an operation leaves all memory as it was: it gives views, or memory alone."""
    if operation._schema.is_mutable:
        return False
    if operation._schema.name.split("::")[-1] in _EMPTY:
        return True
    given = {tensor.untyped_storage().data_ptr() for tensor in _tensors((args, kwargs))}
    return all(
        not tensor.numel() or tensor.untyped_storage().data_ptr() in given
        for tensor in _tensors(output)
    )


def _tensors(tree: Any) -> Iterator[torch.Tensor]:
    return (leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, torch.Tensor))


def _again(noted: Noted) -> Callable[[], object]:
    """Return what runs an operation again, and has its results in the memory they had."""
    operation, args, kwargs, output = noted.operation, noted.args, noted.kwargs, noted.output
    if operation._schema.is_mutable:
        return functools.partial(operation, *args, **kwargs)
    if operation is torch.ops.aten._to_copy.default:
        return functools.partial(torch.Tensor.copy_, output, args[0])
    if isinstance(output, torch.Tensor) and (into := _into(operation)) is not None:
        return functools.partial(into, *args, **kwargs, out=output)
    return functools.partial(_run_again, noted)


@functools.cache
def _into(operation: Any) -> Any:
    """Return the form of an operation that writes its result to `out`; None where there is none."""
    packet = operation.overloadpacket
    given = [(each.name, str(each.type)) for each in operation._schema.arguments]
    for name in packet.overloads():
        arguments = getattr(packet, name)._schema.arguments
        outs = [each.name for each in arguments if each.is_out]
        rest = [(each.name, str(each.type)) for each in arguments if not each.is_out]
        if outs == ["out"] and rest == given:
            return getattr(packet, name)
    return None


def _run_again(noted: Noted) -> None:
    results = noted.operation(*noted.args, **noted.kwargs)
    for output, result in zip(_tensors(noted.output), _tensors(results), strict=True):
        if output.data_ptr() != result.data_ptr():  # where they share memory it is there already
            output.copy_(result)
