"""Small operations of torch as a tape in C, with nothing of Python between them."""

import ctypes
import enum
import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from headinfer.device.host_calls import NativeFunction, address_of
from headinfer.native.build import compile_kernel

AXES = 4
"""Axes that a tape's tensors may have."""

_POINTER = ctypes.c_void_p


class Kind(enum.IntEnum):
    """A kind of operation, as `tape.c` numbers them."""

    CALL, COPY, NEGATE, SQUARE, RSQRT, ADD, SUBTRACT, MULTIPLY, DIVIDE, MEAN, LOOK_UP = range(11)


@dataclass(frozen=True, slots=True)
class Elementwise:
    """A small operation that a tape does, element by element, or along the last axis for a mean.

    Attributes:
        kind: of operation.
        output: where the result goes; its dtype is float32, or one of 16 bits.
        given: tensors or numbers, one or two; tensors are broadcast. For a mean a tensor of float32
            and the lanes of torch's vectors, in whose order it is summed.
        table: for a look-up what torch gives for each of the 65536 values of a dtype in 16 bits.
            The same follows for where numbers below 2**-126 are 0.
    """

    kind: Kind
    output: torch.Tensor
    given: tuple[torch.Tensor | float, ...]
    table: torch.Tensor | None = None

    @property
    def tensors(self) -> list[torch.Tensor]:
        """All tensors that it reads and writes."""
        return [each for each in (self.output, *self.given) if isinstance(each, torch.Tensor)]

    @property
    def half(self) -> torch.dtype | None:
        """The dtype of 16 bits among its tensors; None where there is none."""
        dtypes = {each.dtype for each in self.tensors} - {torch.float32}
        return next(iter(dtypes), None)


class _Operation(ctypes.Structure):
    """A `struct operation` of `tape.c`."""

    _fields_ = (
        *(("call", _POINTER), ("argument", _POINTER), ("memory", _POINTER * 3)),
        *(("sizes", ctypes.c_int64 * AXES), ("strides", ctypes.c_int64 * AXES * 3)),
        *(("kind", ctypes.c_int32), ("types", ctypes.c_int32 * 3), ("value", ctypes.c_float)),
    )


@functools.cache
def tape_library(dtype: torch.dtype) -> ctypes.CDLL | None:
    """Return `tape.c` compiled for one dtype of 16 bits; None where it cannot be had."""
    library = compile_kernel(__package__, "tape.c", dtype)
    if library is not None:
        library.run_tape.argtypes = [_POINTER, ctypes.c_int64, ctypes.c_int64]
        library.run_tape.restype = None
    return library


class Tape:
    """A run of operations in C, to be called again and again.

    It keeps their tensors, and what native functions among them keep.

    Args:
        library: `tape_library` of their dtype.
        operations: in order. Functions among them have an `in_team`, whose threads stay awake from
            the first operation to the last.
    """

    __slots__ = ("_kept", "_operations", "_run")

    def __init__(
        self, library: ctypes.CDLL, operations: Sequence[Elementwise | NativeFunction]
    ) -> None:
        self._kept = tuple(operations)
        self._operations = (_Operation * len(operations))()
        calls = 0
        for filled, operation in zip(self._operations, operations, strict=True):
            if isinstance(operation, Elementwise):
                _fill(filled, operation)
            else:
                assert operation.in_team is not None
                filled.kind = Kind.CALL
                filled.call = address_of(operation.in_team)
                filled.argument = operation.argument
                calls += 1
        self._run = functools.partial(
            library.run_tape, ctypes.addressof(self._operations), len(operations), calls
        )

    def __call__(self) -> None:
        """Do them all."""
        self._run()


def _fill(filled: _Operation, operation: Elementwise) -> None:
    output = operation.output
    shape = operation.tensors[1].shape if operation.kind is Kind.MEAN else output.shape
    lead = (0,) * (AXES - output.ndim)
    filled.kind = operation.kind
    filled.argument = None if operation.table is None else operation.table.data_ptr()
    filled.sizes[:] = (1,) * len(lead) + tuple(shape)
    for part, each in enumerate((output, *operation.given)):
        if not isinstance(each, torch.Tensor):
            filled.value = each
            filled.memory[part] = ctypes.addressof(filled) + _Operation.value.offset
            continue
        filled.memory[part] = each.data_ptr()
        filled.types[part] = each.dtype is not torch.float32
        filled.strides[part][:] = lead + each.expand(shape).stride()
