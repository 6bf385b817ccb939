"""Which of torch's operations a tape does: those whose bits follow from float32, rounded once.

Exponentials are not among them, for torch has its own. Activations in 16 bits are looked up in
tables of what torch gives. Means are done where the tape is found to sum in torch's order.
"""

import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from headinfer.device.tape import AXES, Elementwise, Kind, Tape, tape_library

_MOST_ELEMENTS = 32768
"""Elements from which on torch computes an operation by several threads."""

_PIECE = _MOST_ELEMENTS // 2
"""Elements that one thread computes."""

_TRIED_ROWS = 20
"""Sums for which torch's order is tried out."""

_FEWEST_SUMMED = 32
"""Elements from which on a few sums tell one order from others."""

_DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16})

_aten = torch.ops.aten
_KINDS = {
    _aten.neg.default: (Kind.NEGATE, 1),
    _aten.rsqrt.default: (Kind.RSQRT, 1),
    _aten._to_copy.default: (Kind.COPY, 1),
    _aten.clone.default: (Kind.COPY, 1),
    _aten.add.Tensor: (Kind.ADD, 2),
    _aten.sub.Tensor: (Kind.SUBTRACT, 2),
    _aten.mul.Tensor: (Kind.MULTIPLY, 2),
    _aten.div.Tensor: (Kind.DIVIDE, 2),
}
"""Kinds by operations, each with the number of what it is given."""

_SHOWN = frozenset({_aten._to_copy.default, _aten.clone.default})
"""Operations whose output shows what else they were given."""

_LOOKED_UP = frozenset({_aten.silu.default, _aten.gelu.default})
"""Operations that are looked up."""

_VALUES = 2**16
"""That a dtype in 16 bits has."""

_WHOLE_VECTORS = 64
"""Elements that torch computes alike. Those behind a multiple of them have another exponential."""


@dataclass(frozen=True, slots=True)
class Noted:
    """An operation that was recorded.

    Attributes:
        operation: torch's.
        args: it was given, by position.
        kwargs: by name.
        output: what it gave.
    """

    operation: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any


def elementwise(noted: Noted) -> list[Elementwise] | None:
    """Return what a tape does for an operation; None for one that it does not do."""
    operation, args, output = noted.operation, noted.args, noted.output
    if not isinstance(output, torch.Tensor):
        return None
    if operation in _LOOKED_UP:
        return _looked_up(noted)
    if noted.kwargs and operation not in _SHOWN:
        return None
    kind, count = _KINDS.get(operation, (None, 0))
    parts: list[Elementwise] = []
    if kind is not None and len(args) == count:
        if kind in (Kind.ADD, Kind.SUBTRACT):
            args = tuple(_as_added(each, output.dtype) for each in args)
        parts = [Elementwise(kind, output, args)]
    elif operation is _aten.copy_.default:
        parts = [Elementwise(Kind.COPY, args[0], args[1:2])]
    elif operation is _aten.pow.Tensor_Scalar and args[1] == 2:
        parts = [Elementwise(Kind.SQUARE, output, args[:1])]
    elif operation is _aten.cat.default:
        parts = _joined(output, *args)
    elif operation is _aten.mean.dim:
        parts = _mean(output, *args)
    return parts if parts and all(map(_gives_the_bits, parts)) else None


def _looked_up(noted: Noted) -> list[Elementwise] | None:
    """Return the one look-up that an activation is; None where torch has two ways for it."""
    (given, *rest), output = noted.args, noted.output
    if given.dtype not in _DTYPES - {torch.float32} or output.dtype is not given.dtype:
        return None
    if rest or given.numel() % _WHOLE_VECTORS or not given.is_contiguous():
        return None
    part = Elementwise(Kind.LOOK_UP, output, (given,))
    if not output.is_contiguous() or not _gives_the_bits(part):
        return None
    table = _table(noted.operation, given.dtype, tuple(noted.kwargs.items()))
    return None if table is None else [dataclasses.replace(part, table=table)]


@functools.cache
def _table(
    operation: Any, dtype: torch.dtype, options: tuple[tuple[str, Any], ...]
) -> torch.Tensor | None:
    """Return what an operation gives for all values, and again where tiny numbers are 0.

    None where that cannot be said, as where it depends on an element's place.
    """
    values = torch.arange(_VALUES, dtype=torch.int32, device="cpu").to(torch.int16).view(dtype)

    def computed(some: torch.Tensor) -> torch.Tensor:
        results = [operation(each, **dict(options)) for each in some.split(_PIECE)]
        return torch.cat(results).view(torch.int16)

    flushed, tables = _flushes_tiny(), []
    try:
        for flush in (False, True):
            torch.set_flush_denormal(flush)
            table, backwards = computed(values), computed(values.flip(0))
            if _flushes_tiny() is not flush or not table.equal(backwards.flip(0)):
                return None
            tables.append(table)
    finally:
        torch.set_flush_denormal(flushed)
    return torch.cat(tables)


def _flushes_tiny() -> bool:
    return bool(torch.tensor(1e-39, device="cpu") * 1 == 0)


def _as_added(given: Any, dtype: torch.dtype) -> Any:
    """Return a number as torch adds it: rounded to the dtype of the sum, unlike a factor."""
    if not isinstance(given, (int, float)):
        return given
    return torch.tensor(given, dtype=torch.float32, device="cpu").to(dtype).item()


def _joined(
    output: torch.Tensor, tensors: Sequence[torch.Tensor], axis: int = 0
) -> list[Elementwise]:
    """Return the copies that `torch.cat` is."""
    if any(each.ndim != output.ndim for each in tensors):  # empty ones may have other shapes
        return []
    places = output.split([each.shape[axis] for each in tensors], axis)
    pairs = zip(places, tensors, strict=True)
    return [Elementwise(Kind.COPY, place, (each,)) for place, each in pairs if each.numel()]


def _mean(
    output: torch.Tensor, given: torch.Tensor, axes: Sequence[int] | None, keepdim: bool = False
) -> list[Elementwise]:
    """Return the one mean along the last axis that a tape knows."""
    last = axes is not None and list(axes) in ([-1], [given.ndim - 1])
    if not keepdim or not last or given.stride(-1) != 1:
        return []
    lanes = _lanes(given.shape[-1]) if given.dtype is torch.float32 else 0
    return [Elementwise(Kind.MEAN, output, (given, lanes))] if lanes else []


@functools.cache
def _lanes(size: int) -> int:
    """Return the lanes of torch's vectors for sums of so many elements; 0 if that is not found.

    Without a compiler it is not: torch does all then.
    """
    library = tape_library(torch.bfloat16)
    if size < _FEWEST_SUMMED or library is None:
        return 0
    generator = torch.Generator("cpu").manual_seed(size)
    given = torch.randn(_TRIED_ROWS, size, generator=generator, device="cpu")
    wanted = given.mean(-1, keepdim=True)
    found = torch.empty_like(wanted)
    for lanes in (8, 16, 4):
        Tape(library, [Elementwise(Kind.MEAN, found, (given, lanes))])()
        if torch.equal(found, wanted):
            return lanes
    return 0


def _gives_the_bits(part: Elementwise) -> bool:
    """Whether a tape gives the bits that torch gives."""
    output, dtypes = part.output, {each.dtype for each in part.tensors}
    if not all(isinstance(each, (torch.Tensor, int, float)) for each in part.given):
        return False
    if not dtypes <= _DTYPES or len(dtypes - {torch.float32}) > 1:
        return False
    # With a result in 16 bits, torch may round what it is given in 32 before it computes. Of a root
    # it rounds the last elements twice.
    exact = part.kind is Kind.COPY or (len(dtypes) == 1 and part.kind is not Kind.RSQRT)
    if output.dtype is not torch.float32 and not exact:
        return False
    sizes = [each.numel() for each in part.tensors]
    if output.ndim > AXES or not min(sizes) or max(sizes) >= _MOST_ELEMENTS:
        return False
    return all(each.is_cpu and _is_plain(each) for each in part.tensors)


def _is_plain(tensor: torch.Tensor) -> bool:
    return tensor.layout is torch.strided and not tensor.is_neg()
