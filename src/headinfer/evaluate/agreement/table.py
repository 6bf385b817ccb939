"""Rows of agreement as a table for people, 80 columns wide."""

from collections.abc import Callable, Iterable, Sequence

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from headinfer.bench.result import Status
from headinfer.bench.table import meaning
from headinfer.evaluate.agreement.document import AgreementResults
from headinfer.evaluate.agreement.run import AgreementRow
from headinfer.units import counted, format_bytes, format_tokens

_NOTHING = "-"

_Column = tuple[str, Callable[[AgreementRow], str]]
"""A heading, and what a row has under it."""


def share(row: AgreementRow) -> str:
    """Return the agreement in percent, which reads 100 only where all positions agree."""
    if row.agreement is None:
        return _NOTHING
    return "100%" if not row.differing else f"{min(100 * row.agreement, 99.999):.3f}%"


def _count(value: int | None) -> str:
    return _NOTHING if value is None else str(value)


def _nats(value: float | None) -> str:
    return _NOTHING if value is None else "0" if value == 0 else f"{value:.1e}"


_COLUMNS: tuple[_Column, ...] = (
    ("text", lambda row: format_tokens(row.context_tokens)),
    ("same\ntoken", share),
    ("differ", lambda row: _count(row.differing)),
    ("ties", lambda row: _count(row.ties)),
    ("KL\nmean", lambda row: _nats(row.kl_mean)),
    ("KL\nmax", lambda row: _nats(row.kl_max)),
)
_BESIDE_FLOAT32: tuple[_Column, ...] = (
    ("KL to\nfloat32", lambda row: _nats(row.kl_to_float32)),
    ("stock's", lambda row: _nats(row.stock_kl_to_float32)),
)


def render(results: AgreementResults) -> RenderableType:
    """Return the table, with the conditions above it and what must be known below it."""
    columns = _COLUMNS + (_BESIDE_FLOAT32 if results.spec.beside_float32 else ())
    table = Table(box=box.SIMPLE_HEAD, padding=0, show_edge=False)
    table.add_column("method", no_wrap=True)
    for heading, _ in columns:
        table.add_column(heading, justify="right", no_wrap=True)
    for row in results.arranged_rows:
        table.add_row(row.method, *(cell(row) for _, cell in columns))
    return Group(*map(Text, conditions(results)), table, *map(Text, notes(results.arranged_rows)))


def markdown(results: AgreementResults) -> str:
    """Return the table as Markdown."""
    columns = _COLUMNS + (_BESIDE_FLOAT32 if results.spec.beside_float32 else ())
    headings = ["method", *(heading.replace("\n", " ") for heading, _ in columns)]
    lines = [headings, ["---", *["---:"] * len(columns)]]
    lines += [[row.method, *(cell(row) for _, cell in columns)] for row in results.arranged_rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def conditions(results: AgreementResults) -> Iterable[str]:
    """Yield what was compared on what, in a few lines."""
    spec, head = results.spec, results.header
    yield f"{spec.model.description}, {spec.dtype}"
    yield f"{head['hardware']['gpu'] or head['hardware']['cpu']}, text {head['text']['name']}"
    yield f"stock: {head['stock_attention']} attention, `DynamicCache`; KL from stock in nats"
    most = format_bytes(head["logits_bytes_of_a_pass"])
    tokens = counted(head["most_pass_tokens"], "token")
    yield f"logits of one pass at a time, of at most {most} and {tokens}"


def notes(rows: Sequence[AgreementRow]) -> list[str]:
    """Return what must be known of rows, each text once for a method."""
    found = []
    for row in rows:
        if row.status is not Status.OK:
            reason = row.reason or "an exact method must agree with stock"
            found.append(f"{row.method}: {meaning(row.status)}: {reason}")
        if row.note:
            found.append(f"{row.method}: {row.note}")
        if not row.exact:
            found.append(f"{row.method}: not exact")
    return list(dict.fromkeys(found))
