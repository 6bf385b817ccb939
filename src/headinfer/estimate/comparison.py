"""A table of the paper with our figures beside it."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A row of a table: the paper's figures and ours; None where there is none.

    Attributes:
        label: what the row is about.
        paper: figures as printed.
        ours: as computed.
    """

    label: str
    paper: tuple[float | None, ...]
    ours: tuple[float | None, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """A table of the paper beside ours.

    Attributes:
        title: its number and what it holds.
        unit: of the figures: "GiB", "K tokens" or "s".
        columns: their names.
        rows: in the paper's order.
        notes: why figures differ, a line each.
    """

    title: str
    unit: str
    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    notes: tuple[str, ...]
