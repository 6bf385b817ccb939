"""A whole run: check each method, time it, make rows. Pure Python; models run in other processes.

Rows are yielded as soon as they are finished, and trials are noted as soon as they end. A run that
is stopped loses no more than the trial that was running.
"""

import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace
from typing import Protocol

from headinfer.bench.bound import Rates
from headinfer.bench.catalogue import REFERENCE_METHOD
from headinfer.bench.forecast import Forecast
from headinfer.bench.gate import Verdict, compare
from headinfer.bench.launch import Launcher, Outcome
from headinfer.bench.longest import longest_context
from headinfer.bench.result import Status, TrialFailure, TrialResult
from headinfer.bench.rows import Row, row_of, row_without_result
from headinfer.bench.spec import BenchSpec, Fill, TrialSpec
from headinfer.bench.unfinished import Ended, Unfinished
from headinfer.bench.variant import REFERENCE, Variant
from headinfer.errors import ModelLoadError
from headinfer.units import counted_tokens, format_seconds, format_tokens

GATE_TOKENS = 4133
"""Prompt of the check before timing: several chunks, and no multiple of any tile."""

GATE_STEPS = 8

Check = Verdict | TrialFailure
"""Check of one method before timing: the comparison, or why it did not run."""


class Progress(Protocol):
    """A listener that is told what is going on."""

    def started(self, what: str, left_s: float | None) -> None:
        """Take note of what runs from now on, and of the seconds left of the whole run."""

    def finished(self, what: str, outcome: str) -> None:
        """Take note of how it ended."""


class Suite:
    """A run of a benchmark.

    Args:
        spec: what to measure.
        launcher: runs the trials.
        rates: of the machine.
        progress: told what is going on.
        done: variant and context of rows that an earlier run finished.
        checks: those before timing that an earlier run made, by the names of variants; others are
            added.
        unfinished: trials of an earlier run whose rows it did not finish; others are added, and go
            when their row is yielded.
        noted: called after each addition to either.
    """

    def __init__(
        self,
        spec: BenchSpec,
        launcher: Launcher,
        rates: Rates,
        progress: Progress,
        *,
        done: Collection[tuple[Variant, int]] = (),
        checks: dict[str, Check] | None = None,
        unfinished: Unfinished | None = None,
        noted: Callable[[], object] = lambda: None,
    ) -> None:
        self._noted = noted
        self._checks = {} if checks is None else checks
        self._unfinished = Unfinished() if unfinished is None else unfinished
        self._spec = spec
        self._launcher = launcher
        self._rates = rates
        self._progress = progress
        self._done = set(done)
        self._forecast = Forecast(list(self._trials_to_come()), prefills=spec.fill is Fill.PREFILL)
        self._too_long: dict[Variant, tuple[int, TrialFailure]] = {}

    def run(self) -> Iterator[Row]:
        """Yield the rows that were not done, context by context; see `rows.arranged`.

        Raises:
            ModelLoadError: the model cannot be loaded, so that no trial can run.
        """
        self._check_before_timing()
        if self._spec.command.finds_context:
            for variant in self._spec.variants:
                if not any(variant == done for done, _ in self._done):
                    row = self._longest(variant)
                    self._unfinished.drop(variant)
                    yield row
            return
        for context_tokens in self._spec.contexts:
            yield from self._rows(context_tokens)

    def _trials_to_come(self) -> Iterator[tuple[str, int]]:
        if self._spec.command.finds_context:
            return  # nobody knows how many there will be
        for context_tokens in self._spec.contexts:
            for variant in self._spec.variants:
                if (variant, context_tokens) not in self._done:
                    ended = len(self._unfinished.of(variant, context_tokens))
                    yield from [(variant.name, context_tokens)] * (self._spec.repeats - ended)

    def _trial(self, what: str, variant: Variant, spec: TrialSpec) -> Outcome:
        name = f"{what}: {self._spec.name_of(variant)}, {counted_tokens(spec.context_tokens)}"
        self._progress.started(name, self._forecast.left_s())
        start_s = time.monotonic()
        outcome = self._launcher.trial(spec, self._spec.time_limit_s)
        if isinstance(outcome, TrialFailure) and outcome.ends_run:
            raise ModelLoadError(outcome.reason)
        if isinstance(outcome, TrialResult):
            seconds = time.monotonic() - start_s
            self._forecast.finished(variant.name, spec.context_tokens, seconds)
        else:
            self._forecast.dropped(variant.name, spec.context_tokens)
        self._progress.finished(name, describe(outcome))
        return outcome

    def _compare(self, reference: Outcome | None, outcome: Outcome, tokens: int) -> Verdict | None:
        if isinstance(reference, TrialResult) and isinstance(outcome, TrialResult):
            return compare(
                reference,
                outcome,
                dtype=self._spec.dtype,
                layers=self._spec.model.layers,
                context_tokens=tokens,
            )
        return None

    def _check_before_timing(self) -> None:
        """Compare each method with the reference on a prompt of moderate length.

        The comparison is not needed where every context is as short and the reference is timed
        anyway. Each timed result is then compared itself, unless its cache was filled without a
        prefill.
        """
        spec = self._spec
        longest = max(spec.contexts)
        if spec.command.finds_context:
            longest = min(spec.contexts)  # the least to try
        elif (
            longest <= GATE_TOKENS
            and REFERENCE_METHOD in spec.methods
            and spec.fill is Fill.PREFILL
            and not self._done
            and not self._unfinished
        ):
            return
        missing = [variant for variant in spec.variants if variant.name not in self._checks]
        if missing:
            self._check(missing, min(GATE_TOKENS, longest))
        self._unfinished.reference = None

    def _check(self, missing: Sequence[Variant], tokens: int) -> None:
        """Compare variants with the reference, which an earlier run may have checked."""
        kept = self._unfinished.reference
        reference = kept.outcome if kept is not None and kept.context_tokens == tokens else None
        first = () if reference else (REFERENCE,)
        for variant in dict.fromkeys((*first, *missing)):
            trial = self._spec.trial(variant, tokens)
            trial = replace(trial, new_tokens=GATE_STEPS, fill=Fill.PREFILL)
            outcome = self._trial("check", variant, trial)
            if reference is None:
                reference = outcome
                self._unfinished.reference = Ended(
                    variant=REFERENCE, context_tokens=tokens, outcome=outcome, verdict=None
                )
            verdict = self._compare(reference, outcome, tokens)
            if verdict is not None:
                self._checks[variant.name] = verdict
            elif isinstance(outcome, TrialFailure):
                self._checks[variant.name] = outcome
            self._noted()

    def _refused(self, variant: Variant, context_tokens: int) -> Row | None:
        """Return the row of a variant that needs no trial: its check, or a shorter context, failed.

        One that only lacked memory or time in the check may still serve a shorter context.
        """
        check = self._checks.get(variant.name)
        if isinstance(check, TrialFailure):
            if check.grows and context_tokens < GATE_TOKENS:
                return None
            return row_without_result(
                self._spec, variant, context_tokens, check.status, check.reason
            )
        if check is not None and not check.passed and variant.exact:
            return row_without_result(
                self._spec, variant, context_tokens, Status.MISMATCH, check.reason, check
            )
        if variant in self._too_long:
            shorter, failure = self._too_long[variant]
            if shorter <= context_tokens:
                reason = f"already at {format_tokens(shorter)}: {failure.reason}"
                return row_without_result(
                    self._spec, variant, context_tokens, failure.status, reason
                )
        return None

    def _rows(self, context_tokens: int) -> Iterator[Row]:
        """Time every variant at one context, and yield each row after its last trial.

        Variants take turns over the repeats, so that a slow spell of the machine meets each.
        """
        variants = []
        for variant in self._spec.variants:
            if (variant, context_tokens) in self._done:
                continue
            row = self._refused(variant, context_tokens)
            if row is None:
                variants.append(variant)
                continue
            for _ in range(self._spec.repeats):
                self._forecast.dropped(variant.name, context_tokens)
            self._unfinished.drop(variant, context_tokens)
            yield row
        variants.sort(key=lambda variant: variant != REFERENCE)  # others are compared with it
        reference: Outcome | None = None
        for repeat in range(self._spec.repeats):
            for variant in variants:
                ended = self._unfinished.of(variant, context_tokens)
                if any(isinstance(trial.outcome, TrialFailure) for trial in ended):
                    self._forecast.dropped(variant.name, context_tokens)
                elif len(ended) <= repeat:
                    what = f"trial {repeat + 1} of {self._spec.repeats}"
                    trial = self._spec.trial(variant, context_tokens)
                    outcome = self._trial(what, variant, trial)
                    if variant == REFERENCE:
                        reference = reference or outcome
                    ended.append(self._ended(variant, context_tokens, outcome, reference))
                if repeat + 1 == self._spec.repeats:
                    row = self._row(variant, context_tokens, ended)
                    self._unfinished.drop(variant, context_tokens)
                    yield row

    def _ended(
        self, variant: Variant, context_tokens: int, outcome: Outcome, reference: Outcome | None
    ) -> Ended:
        """Keep a trial, compared with the reference's, until its row is finished."""
        verdict = self._compare(reference, outcome, context_tokens)
        ended = self._unfinished.add(variant, context_tokens, outcome, verdict)
        self._noted()
        return ended

    def _row(self, variant: Variant, context_tokens: int, ended: Sequence[Ended]) -> Row:
        """Return one row; the verdict of the timed trials themselves outranks the check's."""
        check = self._checks.get(variant.name)
        verdict = check if isinstance(check, Verdict) else None
        results = []
        for trial in ended:
            outcome = trial.outcome
            if isinstance(outcome, TrialFailure):
                if outcome.grows:
                    self._too_long[variant] = context_tokens, outcome
                return row_without_result(
                    self._spec, variant, context_tokens, outcome.status, outcome.reason, verdict
                )
            results.append(outcome)
            verdict = trial.verdict or verdict
            if verdict is not None and not verdict.passed:
                break
        return self._judged(
            row_of(self._spec, variant, context_tokens, results, self._rates, verdict)
        )

    def _judged(self, row: Row) -> Row:
        """Return a row with the status its comparison gives it, and without numbers if wrong."""
        if row.gate is None:
            reason = f"{REFERENCE_METHOD} could not run, so there is nothing to compare with"
            return replace(row, status=Status.UNCHECKED, reason=reason)
        if row.gate.passed:
            return row
        if not row.exact:
            off = f"not exact: logits are off by {row.gate.logits_error:.2g} of their length"
            return replace(row, note=f"{row.note}; {off}" if row.note else off)
        return row_without_result(
            self._spec, row.variant, row.context_tokens, Status.MISMATCH, row.gate.reason, row.gate
        )

    def _longest(self, variant: Variant) -> Row:
        """Find the longest context of a variant by running it."""
        first, last = min(self._spec.contexts), max(self._spec.contexts)
        refused = self._refused(variant, first)
        if refused is not None:
            return refused
        ended: dict[int, Ended] = {}

        def runs(tokens: int) -> bool:
            before = self._unfinished.of(variant, tokens)
            ended[tokens] = before[0] if before else self._try(variant, tokens)
            return isinstance(ended[tokens].outcome, TrialResult)

        tokens = longest_context(runs, first=first, last=last)
        outcomes = {tokens: ended[tokens].outcome for tokens in sorted(ended)}
        tried = tuple((tokens, describe(outcome)) for tokens, outcome in outcomes.items())
        failed = min((n for n in outcomes if n > tokens), default=None)
        if not tokens:
            failure = outcomes[first]
            assert isinstance(failure, TrialFailure)
            row = row_without_result(self._spec, variant, 0, failure.status, failure.reason)
            return replace(row, tried=tried)
        row = self._row(variant, tokens, [ended[tokens]])
        limit = f"the most that was tried, {format_tokens(last)}"
        if failed is not None:
            limit = f"{format_tokens(failed)}: {describe(outcomes[failed])}"
        return replace(row, tried=tried, limited_by=limit)

    def _try(self, variant: Variant, context_tokens: int) -> Ended:
        """Run a trial of a search."""
        trial = self._spec.trial(variant, context_tokens)
        outcome = self._trial("longest", variant, trial)
        return self._ended(variant, context_tokens, outcome, None)


def describe(outcome: Outcome) -> str:
    """Return how a trial ended, in words."""
    if isinstance(outcome, TrialFailure):
        return f"{outcome.status.value.replace('_', ' ')}: {outcome.reason}"
    prefill = "" if outcome.prefill_s is None else f"prefill {format_seconds(outcome.prefill_s)}, "
    return f"{prefill}slowest decode step {format_seconds(max(outcome.decode_s))}"
