"""Rows of answers as a table for people, 80 columns wide."""

from collections.abc import Callable, Iterable, Sequence
from statistics import mean

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from headinfer.bench.catalogue import CATALOGUE, REFERENCE_METHOD
from headinfer.bench.result import Status
from headinfer.bench.table import meaning, number
from headinfer.evaluate.answers.document import Answers
from headinfer.evaluate.answers.record import Likeness, likeness
from headinfer.evaluate.answers.run import AnswersRow
from headinfer.units import exact_bytes, format_tokens

_NOTHING = "-"

_MOST_GROUPS = 7
"""Groups of scores beside each other, so that a table has 80 columns at most."""

_Cell = Callable[[AnswersRow, Likeness | None], str]


def percent(row: AnswersRow) -> str:
    """Return the mean score in percent."""
    return _NOTHING if row.score is None else f"{100 * row.score:.1f}"


def seen(row: AnswersRow) -> str:
    """Return the most tokens of a prompt that the method saw."""
    seen = [each.answer.read_tokens + each.answer.kept_tokens for each in row.records]
    return format_tokens(max(seen)) if seen else _NOTHING


def _prefill(row: AnswersRow) -> str:
    return number(mean(each.answer.prefill_s for each in row.records)) if row.records else _NOTHING


def _decode(row: AnswersRow) -> str:
    steps = sum(len(each.answer.tokens) - 1 for each in row.records)
    seconds = sum(each.answer.decode_s for each in row.records)
    return number(seconds / steps, 1000) if steps else _NOTHING


_COLUMNS: tuple[tuple[str, _Cell], ...] = (
    ("context", lambda row, _: format_tokens(row.context_tokens)),
    ("seen", lambda row, _: seen(row)),
    ("asked", lambda row, _: str(len(row.records))),
    ("score\n%", lambda row, _: percent(row)),
    ("as\nstock", lambda _, like: _NOTHING if like is None else f"{like.same}/{like.compared}"),
    ("ties", lambda _, like: _NOTHING if like is None else str(like.tied)),
    ("prefill\ns", lambda row, _: _prefill(row)),
    ("ms a\ntoken", lambda row, _: _decode(row)),
)


def compared(results: Answers, row: AnswersRow) -> Likeness | None:
    """Return how a row's answers compare with stock's; None where none can be compared."""
    stock = results.rows.get((REFERENCE_METHOD, row.context_tokens))
    if stock is None or stock.key == row.key:
        return None
    found = likeness(stock.records, row.records)
    return found if found.compared else None


def render(results: Answers) -> RenderableType:
    """Return the table, with the conditions above it and what must be known below it."""
    table = Table(box=box.SIMPLE_HEAD, padding=0, show_edge=False)
    table.add_column("method", no_wrap=True)
    for heading, _ in _COLUMNS:
        table.add_column(heading, justify="right", no_wrap=True)
    for row in results.arranged_rows:
        like = compared(results, row)
        table.add_row(row.method, *(cell(row, like) for _, cell in _COLUMNS))
    below = [*notes(results.arranged_rows), *_remarks(results)]
    return Group(*map(Text, conditions(results)), table, *_group_tables(results), *map(Text, below))


def _group_tables(results: Answers) -> Iterable[Table]:
    """Yield the scores by group, a few groups in a table."""
    task = results.spec.task
    names = list(task.scores(()))
    if len(names) < 2:
        return
    for first in range(0, len(names), _MOST_GROUPS):
        shown = names[first : first + _MOST_GROUPS]
        table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
        table.add_column("score %", no_wrap=True)
        for heading in ("context", *shown):
            table.add_column(heading.replace("_", "\n"), justify="right", no_wrap=True)
        for row in results.arranged_rows:
            scores = task.scores(row.records)
            cells = (scores[name] for name in shown)
            table.add_row(
                row.method,
                format_tokens(row.context_tokens),
                *(_NOTHING if cell is None else f"{100 * cell:.1f}" for cell in cells),
            )
        yield table


def _remarks(results: Answers) -> Iterable[str]:
    """Yield what a task tells of its rows beside scores."""
    task = results.spec.task
    for row in results.arranged_rows:
        for remark in task.remarks(row.records):
            yield f"{row.method} at {format_tokens(row.context_tokens)}: {remark}"


def conditions(results: Answers) -> Iterable[str]:
    """Yield what was asked on what, in a few lines."""
    spec, head = results.spec, results.header
    yield f"{spec.task.name}: {spec.model.description}, {spec.dtype}"
    yield from spec.task.told()
    yield f"{head['hardware']['gpu'] or head['hardware']['cpu']}"
    if (held := spec.settings.device_memory_bytes) is not None:
        device = "CPU" if head["device"] == "cpu" else "GPU"
        if spec.settings.device == "simulated":
            device = "simulated GPU"
        yield f"{device} memory held to {exact_bytes(held)}; longer prompts are cut in the middle"


def notes(rows: Sequence[AnswersRow]) -> list[str]:
    """Return what must be known of rows, each text once for a method."""
    found = []
    for row in rows:
        if row.status is not Status.OK:
            found.append(f"{row.method}: {meaning(row.status)}: {row.reason}")
        found += [f"{row.method}: {note}" for note in row.notes]
        if not CATALOGUE[row.method].exact:
            found.append(f"{row.method}: not exact")
        if not row.is_finished:
            found.append(f"{row.method} at {format_tokens(row.context_tokens)}: not finished")
    return list(dict.fromkeys(found))
