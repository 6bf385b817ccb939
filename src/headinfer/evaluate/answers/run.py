"""A whole run: every method answers the questions of every context. Pure Python.

Models run in other processes. A method that lacks memory for a prompt goes on with prompts that are
cut in the middle to what it holds. The rows of the paper's Tables 1, 2 and 8 do the same.
"""

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from headinfer.bench.catalogue import CATALOGUE, REFERENCE_METHOD
from headinfer.bench.launch import Outcome
from headinfer.bench.longest import longest_context
from headinfer.bench.result import Status, TrialFailure, TrialResult
from headinfer.errors import ModelLoadError
from headinfer.evaluate.answers.job import AnswersSpec
from headinfer.evaluate.answers.launch import Launcher
from headinfer.evaluate.answers.record import Record, likeness, mean_score
from headinfer.evaluate.pace import Pace, Progress
from headinfer.units import counted, counted_tokens

_FIRST_TOKENS = 1024
"""The first context of the search for the most that a method holds."""

_STEP_TOKENS = 128
"""How exactly it is looked for, where a sixteenth of it is less."""

_SHARE_LESS = 15 / 16
"""A cut that lacks memory all the same is made shorter by so much."""

_MOST_CUTS = 24
"""Cuts of a row; the last one is then to a quarter of what was found."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswersRow:
    """A method's answers at one context.

    Attributes:
        method: its name.
        context_tokens: the most tokens of a prompt.
        exact: whether the method's results must be stock's.
        status: how it ended. `MISMATCH` is an exact method in float32 with another answer.
        reason: why it ended early.
        notes: what a reader must know.
        limit_tokens: the most tokens that the method holds; None where no limit was met.
        is_finished: whether every question was answered, or none can be any more.
        records: of the questions answered.
        tried: while that limit is looked for, the contexts that were tried and whether each ran.
    """

    method: str
    context_tokens: int
    exact: bool
    status: Status = Status.OK
    reason: str = ""
    notes: tuple[str, ...] = ()
    limit_tokens: int | None = None
    is_finished: bool = False
    records: tuple[Record, ...] = ()
    tried: tuple[tuple[int, bool], ...] = ()

    @property
    def key(self) -> tuple[str, int]:
        """What tells the row from others."""
        return self.method, self.context_tokens

    @property
    def score(self) -> float | None:
        """Mean score of the answers; None where there are none."""
        return mean_score(self.records)

    def to_json(self) -> dict[str, Any]:
        """Return the row as JSON values."""
        return asdict(self) | {
            "status": self.status.value,
            "score": self.score,
            "records": [record.to_json() for record in self.records],
        }

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "AnswersRow":
        """Return the row that `to_json` gave."""
        rest = {name: value for name, value in values.items() if name != "score"}
        parts = {
            "status": Status(values["status"]),
            "notes": tuple(values["notes"]),
            "records": tuple(map(Record.from_json, values["records"])),
            "tried": tuple(map(tuple, values.get("tried", ()))),
        }
        return cls(**(rest | parts))


class AnswersRun:
    """A run over all methods and contexts of a spec.

    Args:
        spec: what is asked.
        launcher: runs the jobs.
        progress: told of every row and answer.
        rows: of an earlier run; finished ones are left as they are, others are gone on with.
        noted: told of a row each time that a context was tried for it.
    """

    def __init__(
        self,
        spec: AnswersSpec,
        launcher: Launcher,
        progress: Progress,
        rows: Sequence[AnswersRow] = (),
        noted: Callable[[AnswersRow], object] = lambda _row: None,
    ) -> None:
        self._noted = noted
        self._spec = spec
        self._launcher = launcher
        self._progress = progress
        self._rows = {row.key: row for row in rows}
        self._limits = {row.method: row.limit_tokens for row in rows if row.limit_tokens}
        self._questions = {each: spec.task.questions(each) for each in spec.contexts}
        self._pace = Pace(list(self._tokens_to_come()))

    def _tokens_to_come(self) -> Iterator[int]:
        for context in self._spec.contexts:
            for method in self._spec.methods:
                yield from [context] * self._missing(self._begun(method, context))

    def _begun(self, method: str, context: int) -> AnswersRow:
        new = AnswersRow(method=method, context_tokens=context, exact=CATALOGUE[method].exact)
        row = self._rows.get((method, context), new)
        return replace(new, records=row.records) if row.status is Status.FAILED else row

    def _missing(self, row: AnswersRow) -> int:
        if row.status is Status.CANNOT_RUN:
            return 0
        return max(0, self._questions[row.context_tokens] - len(row.records))

    def rows(self) -> Iterator[AnswersRow]:
        """Yield a row after each of its answers, with all that it has so far.

        The reference comes first at each context, for the others are compared with it.

        Raises:
            ModelLoadError: the model cannot be loaded, so that nothing can run.
        """
        methods = sorted(self._spec.methods, key=lambda method: method != REFERENCE_METHOD)
        for context in self._spec.contexts:
            for method in methods:
                row = self._begun(method, context)
                if self._missing(row) or not row.is_finished:
                    yield from self._answered(row)
                elif row.status is Status.OK and self._is_wrong(row):  # stock answered since
                    yield self._ended(row, None)

    def _answered(self, row: AnswersRow) -> Iterator[AnswersRow]:
        what = f"{row.method} at {counted_tokens(row.context_tokens)}"
        self._progress.started(what, self._pace.left_s())
        row = replace(row, limit_tokens=self._limit_of(row), is_finished=False)
        cuts = 0
        while True:
            answered = len(row.records)
            row, failure = yield from self._job(row, what)
            if failure is None or not failure.grows:
                break
            if len(row.records) > answered:  # memory that was fragmented is whole in a new process
                continue
            limit = self._shorter(row) if cuts < _MOST_CUTS else None
            if limit is None:
                break
            cuts += 1
            self._limits[row.method] = limit
            row = replace(row, limit_tokens=limit, tried=())
            self._noted(row)
        row = self._ended(replace(row, tried=()), failure)
        self._progress.finished(what, row.reason or said(row))
        yield row

    def _job(
        self, row: AnswersRow, what: str
    ) -> Generator[AnswersRow, None, tuple[AnswersRow, TrialFailure | None]]:
        """Answer what is missing in a row; yield the row after each answer.

        Returns:
            The row, and what ended the job early, if anything.
        """
        job = self._spec.job(
            row.method,
            row.context_tokens,
            row.limit_tokens,
            tuple(record.question for record in row.records),
        )
        failure = None
        for given in self._launcher.job(job):
            if isinstance(given, TrialFailure):
                failure = given
            elif isinstance(given, str):
                row = replace(row, notes=tuple(dict.fromkeys((*row.notes, given))))
            else:
                row = self._with(row, given)
                self._progress.moved(f"{what}: {said(row)}", self._pace.left_s())
                yield row
        return row, failure

    def _limit_of(self, row: AnswersRow) -> int | None:
        """Return the limit that a method met before, where this context is beyond it."""
        limit = self._limits.get(row.method)
        whole = row.context_tokens + self._spec.task.max_new_tokens
        return limit if limit is not None and limit < whole else None

    def _with(self, row: AnswersRow, record: Record) -> AnswersRow:
        self._pace.finish(row.context_tokens, ran=True)
        row = replace(row, records=(*row.records, record))
        self._rows[row.key] = row
        return row

    def _ended(self, row: AnswersRow, failure: TrialFailure | None) -> AnswersRow:
        if failure is not None:
            if failure.ends_run:
                raise ModelLoadError(failure.reason)
            for _ in range(self._missing(row)):
                self._pace.finish(row.context_tokens, ran=False)
            row = replace(row, status=failure.status, reason=failure.reason)
        elif self._is_wrong(row):
            reason = "an exact method must answer as stock does"
            row = replace(row, status=Status.MISMATCH, reason=reason)
        row = replace(row, is_finished=row.status is not Status.FAILED)
        self._rows[row.key] = row
        return row

    def _is_wrong(self, row: AnswersRow) -> bool:
        stock = self._rows.get((REFERENCE_METHOD, row.context_tokens))
        if stock is None or not row.exact or self._spec.dtype != "float32":
            return False
        return likeness(stock.records, row.records).differing > 0

    def _shorter(self, row: AnswersRow) -> int | None:
        """Return the most tokens that a method holds, by trying; None where it holds nothing."""
        new_tokens = self._spec.task.max_new_tokens
        if row.limit_tokens is not None:  # it was tried with other tokens, and just lacked memory
            shorter = int(row.limit_tokens * _SHARE_LESS)
            return shorter if shorter > new_tokens else None

        tried = dict(row.tried)

        def runs(tokens: int) -> bool:
            if tokens in tried:
                return tried[tokens]
            outcome = self._tried(row.method, tokens)
            if isinstance(outcome, TrialFailure) and outcome.status is Status.FAILED:
                return False  # and tried anew when this goes on: an error may not come again
            tried[tokens] = isinstance(outcome, TrialResult)
            self._noted(replace(row, tried=tuple(tried.items())))
            return tried[tokens]

        first = min(_FIRST_TOKENS, row.context_tokens)
        held = longest_context(runs, first=first, last=row.context_tokens, step_tokens=_STEP_TOKENS)
        return held + new_tokens if held else None

    def _tried(self, method: str, tokens: int) -> Outcome:
        """Try whether a method holds so many tokens."""
        self._progress.moved(
            f"{method}: does it hold {counted_tokens(tokens)}?", self._pace.left_s()
        )
        trial = self._spec.job(method, tokens, None, ()).trial()
        return self._launcher.trial(trial)


def said(row: AnswersRow) -> str:
    """Return a row's result in a few words."""
    if row.score is None:
        return "no answers"
    return f"{counted(len(row.records), 'answer')}, score {row.score:.0%}"
