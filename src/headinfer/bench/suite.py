"""A whole run: check each method, time it, make rows. Pure Python; models run in other processes.

Rows are yielded as each context ends.
"""

import signal
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Protocol

from headinfer.bench import child
from headinfer.bench.bound import Rates
from headinfer.bench.gate import Verdict, compare
from headinfer.bench.result import Status, TrialFailure, TrialResult, from_json
from headinfer.bench.rows import Row, row_of, row_without_result, with_ratios
from headinfer.bench.spec import REFERENCE_METHOD, BenchSpec, TrialSpec
from headinfer.units import format_tokens

GATE_TOKENS = 4133
"""Prompt of the check before timing: several chunks, and no multiple of any tile."""

GATE_STEPS = 8

Outcome = TrialResult | TrialFailure


class Progress(Protocol):
    """Told what is going on."""

    def started(self, what: str) -> None:
        """Take note of what runs from now on."""

    def finished(self, what: str, outcome: str) -> None:
        """Take note of how it ended."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """The machine as measured.

    Attributes:
        device: kind of device the model computes on.
        hardware: names and sizes, for the header.
        rates: what it can do.
        rates_by: for each rate, the operation that reached it.
    """

    device: str
    hardware: dict[str, Any]
    rates: Rates
    rates_by: dict[str, str]


class Launcher(Protocol):
    """Runs things where they do not disturb each other."""

    def machine(self, device: str, dtype: str) -> Machine:
        """Measure the machine."""

    def trial(self, spec: TrialSpec) -> Outcome:
        """Run one trial."""


class FreshProcesses:
    """A new process for each thing."""

    def machine(self, device: str, dtype: str) -> Machine:
        """Measure the machine in a process, so that this one never holds a device."""
        answer = child.ask("headinfer.bench.machine", {"device": device, "dtype": dtype})
        return Machine(**(answer | {"rates": Rates(**answer["rates"])}))

    def trial(self, spec: TrialSpec) -> Outcome:
        """Run one trial in a process; one that dies is a failure."""
        try:
            return from_json(child.ask("headinfer.bench.trial", spec.to_json()))
        except child.ChildError as error:
            if error.returncode == -signal.SIGKILL:
                reason = "killed by the system, most likely for lack of memory"
                return TrialFailure(status=Status.CANNOT_RUN, reason=reason)
            last = next(iter(reversed(error.stderr.strip().splitlines())), "no message")
            reason = f"the process ended with status {error.returncode}: {last}"
            return TrialFailure(status=Status.FAILED, reason=reason)


def run_suite(
    spec: BenchSpec, launcher: Launcher, machine: Machine, progress: Progress
) -> Iterator[Row]:
    """Yield the rows, context by context, in the order of the methods."""
    suite = _Suite(spec, launcher, machine.rates, progress)
    checks = suite.check_before_timing()
    for context_tokens in spec.contexts:
        yield from suite.rows(context_tokens, checks)


def _describe(outcome: Outcome) -> str:
    if isinstance(outcome, TrialFailure):
        return f"{outcome.status.value.replace('_', ' ')}: {outcome.reason}"
    slowest = max(outcome.decode_s)
    return f"prefill {outcome.prefill_s:.2f} s, slowest decode step {slowest * 1000:.1f} ms"


class _Suite:
    def __init__(
        self, spec: BenchSpec, launcher: Launcher, rates: Rates, progress: Progress
    ) -> None:
        self._spec = spec
        self._launcher = launcher
        self._rates = rates
        self._progress = progress

    def _trial(self, what: str, spec: TrialSpec) -> Outcome:
        name = f"{what}: {spec.method}, {format_tokens(spec.context_tokens)} tokens"
        self._progress.started(name)
        outcome = self._launcher.trial(spec)
        self._progress.finished(name, _describe(outcome))
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

    def check_before_timing(self) -> dict[str, Verdict | TrialFailure]:
        """Compare each method with the reference on a prompt of moderate length.

        Not needed where every context is as short and the reference is timed anyway: then each
        timed result is compared itself.
        """
        spec = self._spec
        longest = max(spec.contexts)
        if longest <= GATE_TOKENS and REFERENCE_METHOD in spec.methods:
            return {}
        tokens = min(GATE_TOKENS, longest)
        outcomes: dict[str, Outcome] = {}
        for method in dict.fromkeys((REFERENCE_METHOD, *spec.methods)):
            trial = replace(spec.trial(method, tokens), new_tokens=GATE_STEPS)
            outcomes[method] = self._trial("check", trial)
        checks: dict[str, Verdict | TrialFailure] = {}
        for method, outcome in outcomes.items():
            verdict = self._compare(outcomes[REFERENCE_METHOD], outcome, tokens)
            if verdict is not None:
                checks[method] = verdict
            elif isinstance(outcome, TrialFailure):
                checks[method] = outcome
        return checks

    def rows(self, context_tokens: int, checks: dict[str, Verdict | TrialFailure]) -> list[Row]:
        """Time every method at one context that passed its check."""
        spec = self._spec
        finished: dict[str, Row] = {}
        for method in spec.methods:
            check = checks.get(method)
            if isinstance(check, TrialFailure):
                finished[method] = row_without_result(
                    spec, method, context_tokens, check.status, check.reason
                )
            elif check is not None and not check.passed:
                finished[method] = row_without_result(
                    spec, method, context_tokens, Status.MISMATCH, check.reason, check
                )
        remaining = [method for method in spec.methods if method not in finished]
        outcomes = self._time(remaining, context_tokens)
        reference = next(iter(outcomes.get(REFERENCE_METHOD, [])), None)
        for method in remaining:
            check = checks.get(method)
            assert not isinstance(check, TrialFailure)
            finished[method] = self._row(method, context_tokens, outcomes[method], reference, check)
        return with_ratios([finished[method] for method in spec.methods])

    def _time(self, methods: list[str], context_tokens: int) -> dict[str, list[Outcome]]:
        """Run all repeats, the methods in turn, so that a slow spell of the machine meets each."""
        outcomes: dict[str, list[Outcome]] = {method: [] for method in methods}
        for repeat in range(self._spec.repeats):
            for method in methods:
                if any(isinstance(outcome, TrialFailure) for outcome in outcomes[method]):
                    continue
                what = f"trial {repeat + 1} of {self._spec.repeats}"
                trial = self._spec.trial(method, context_tokens)
                outcomes[method].append(self._trial(what, trial))
        return outcomes

    def _row(
        self,
        method: str,
        context_tokens: int,
        outcomes: list[Outcome],
        reference: Outcome | None,
        check: Verdict | None,
    ) -> Row:
        """Return one row; the verdict of the timed trials themselves outranks the check's."""
        results = [outcome for outcome in outcomes if isinstance(outcome, TrialResult)]
        for outcome in outcomes:
            if isinstance(outcome, TrialFailure):
                return row_without_result(
                    self._spec, method, context_tokens, outcome.status, outcome.reason, check
                )
            verdict = self._compare(reference, outcome, context_tokens) or check
            check = verdict
            if verdict is not None and not verdict.passed:
                break
        row = row_of(self._spec, method, context_tokens, results, self._rates, check)
        if check is None:
            reason = f"{REFERENCE_METHOD} could not run, so there is nothing to compare with"
            return replace(row, status=Status.UNCHECKED, reason=reason)
        if not check.passed:
            return row_without_result(
                self._spec, method, context_tokens, Status.MISMATCH, check.reason, check
            )
        return row
