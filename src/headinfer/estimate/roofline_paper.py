"""The paper's Table 12 as printed, beside ours, with a reason wherever the two differ.

Table 13, the same for the A100, is not compared cell by cell. It follows from the same operations
and bytes with other ceilings, which `roofline` takes from the preset.
"""

import enum
from collections.abc import Iterator
from dataclasses import dataclass

from headinfer.estimate.machines import preset_hardware
from headinfer.estimate.roofline import PAPER_CONTEXTS, Operator, Phase, Roof, Row, roofline_rows
from headinfer.plan.shape import ModelShape

PAPER_HARDWARE = "rtx-4090"
"""Preset of the machine of Table 12."""

PAPER_MODEL = "llama-3-8b"
"""Preset of the model of Table 12."""

_TABLE_12 = {
    (Phase.PREFILL, Operator.FLASH_ATTENTION): (
        "17G   21M   820    165T  compute   4.2M  4100    102T  memory",
        "1.7T  209M  8200   165T  compute   42M   41000   165T  compute",
        "172T  2.1G  82000  165T  compute   419M  410000  165T  compute",
    ),
    (Phase.PREFILL, Operator.HEAD_WISE): (
        "2.1G  2.6M  820    165T  compute   0.5M  4100    102T  memory",
        "215G  26M   8200   165T  compute   5.2M  41000   312T  compute",
        "21T   262M  82000  165T  compute   52M   410000  312T  compute",
    ),
    (Phase.DECODE, Operator.FLASH_ATTENTION): (
        "17M   17M   1      1T    memory    17M   1       13G   memory",
        "168M  168M  1      1T    memory    168M  1       13G   memory",
        "1.7G  1.7G  1      1T    memory    1.7G  1       13G   memory",
    ),
    (Phase.DECODE, Operator.HEAD_WISE): (
        "2.1M  2.1M  1      1T    memory    2.1M  1       13G   memory",
        "21M   21M   1      1T    memory    21M   1       13G   memory",
        "210M  210M  1      1T    memory    210M  1       13G   memory",
    ),
}
"""A row for each of `PAPER_CONTEXTS`: operations, four regular columns, four offloaded ones."""

_POWERS = {"": 1, "M": 10**6, "G": 10**9, "T": 10**12}


class Column(enum.Enum):
    """A column of either half of the table."""

    OPERATIONS = "operations"
    BYTES = "bytes"
    INTENSITY = "intensity"
    RATE = "FLOP/s"
    BOUND = "bound"


class Reason(enum.Enum):
    """Why a cell of ours differs from the paper's."""

    QUERY_HEADS = (
        "the paper reads keys and values once for each of 32 query heads; they are stored, and "
        "read by a fused kernel, once for each of 8 KV heads"
    )
    SLOW_LINK = (
        "13 GFLOP/s at 1 FLOP/byte is a link of 13 GB/s, but 102 TFLOP/s at 4100 FLOP/byte is one "
        "of 25 GB/s, the rate that the paper gives its link"
    )
    OTHER_DEVICE = "312 TFLOP/s is the ceiling of the A100 (Table 13); this device's is 165"
    NAMED_LINK = "the paper says memory for the link too; we name the link"


_REASONS = {
    (Phase.DECODE, False, Column.BYTES): Reason.QUERY_HEADS,
    (Phase.DECODE, False, Column.INTENSITY): Reason.QUERY_HEADS,
    (Phase.DECODE, False, Column.RATE): Reason.QUERY_HEADS,
    (Phase.DECODE, True, Column.BYTES): Reason.QUERY_HEADS,
    (Phase.DECODE, True, Column.INTENSITY): Reason.QUERY_HEADS,
    (Phase.DECODE, True, Column.RATE): Reason.SLOW_LINK,
    (Phase.DECODE, True, Column.BOUND): Reason.NAMED_LINK,
    (Phase.PREFILL, True, Column.RATE): Reason.OTHER_DEVICE,
    (Phase.PREFILL, True, Column.BOUND): Reason.NAMED_LINK,
}
"""By phase, whether offloaded, and column."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """A cell: one figure, the paper's and ours.

    Attributes:
        column: what it is.
        offloaded: whether it stands in the offloaded half.
        paper: as the paper prints it.
        ours: as computed; the bound by name.
        reason: why they differ; None when ours rounds, or is cut, to what the paper prints.
    """

    column: Column
    offloaded: bool
    paper: str
    ours: float | str
    reason: Reason | None


def compare(shape: ModelShape) -> Iterator[tuple[Row, tuple[Cell, ...]]]:
    """Yield our rows for the paper's machine and contexts, each with its nine cells.

    Args:
        shape: of `PAPER_MODEL`.
    """
    for row in roofline_rows(shape, preset_hardware(PAPER_HARDWARE), PAPER_CONTEXTS):
        assert row.offloaded is not None  # the paper's machine has a link
        printed = _TABLE_12[row.phase, row.operator][PAPER_CONTEXTS.index(row.context_tokens)]
        ours = (
            (Column.OPERATIONS, False, float(row.operations)),
            *_figures(row.device, offloaded=False),
            *_figures(row.offloaded, offloaded=True),
        )
        yield (
            row,
            tuple(
                _cell(row.phase, *figure, paper)
                for figure, paper in zip(ours, printed.split(), strict=True)
            ),
        )


def _figures(roof: Roof, *, offloaded: bool) -> Iterator[tuple[Column, bool, float | str]]:
    yield Column.BYTES, offloaded, float(roof.bytes)
    yield Column.INTENSITY, offloaded, roof.intensity_flops_per_byte
    yield Column.RATE, offloaded, roof.attainable_flops_per_s
    yield Column.BOUND, offloaded, roof.bound.value


def _cell(phase: Phase, column: Column, offloaded: bool, ours: float | str, paper: str) -> Cell:
    same = paper == ours if isinstance(ours, str) else _rounds_to(ours, paper)
    reason = None if same else _REASONS[phase, offloaded, column]
    return Cell(column=column, offloaded=offloaded, paper=paper, ours=ours, reason=reason)


def _rounds_to(value: float, printed: str) -> bool:
    """Whether a value lies within one unit of the last significant digit that is printed."""
    digits = printed.rstrip("MGT")
    power = _POWERS[printed[len(digits) :]]
    whole, _, decimals = digits.partition(".")
    zeros = 0 if decimals else len(whole) - len(whole.rstrip("0"))
    unit = 10.0 ** (zeros - len(decimals))
    return abs(value - float(digits) * power) < unit * power
