"""Where jobs run: each in a fresh process, so that none disturbs the next. Pure Python."""

from collections.abc import Iterator
from typing import Any, Protocol

from headinfer.bench import child
from headinfer.bench.launch import FreshProcesses, Outcome, death
from headinfer.bench.result import TrialFailure, from_json
from headinfer.bench.spec import TrialSpec
from headinfer.errors import OptionError
from headinfer.evaluate.answers.job import JobSpec
from headinfer.evaluate.answers.record import Record


class Launcher(Protocol):
    """A launcher runs jobs, and trials of the benchmarks."""

    def machine(self, device: str) -> dict[str, Any]:
        """Return the kind of `device` that a run computes on, and its `hardware`.

        Args:
            device: as in the settings.
        """

    def job(self, job: JobSpec) -> Iterator[Record | TrialFailure | str]:
        """Yield records, notes for people, and last what ended the job early, if anything did."""

    def trial(self, spec: TrialSpec) -> Outcome:
        """Run one trial, which tells whether a method holds a context."""


class Workers:
    """A new process for each job and each trial."""

    def machine(self, device: str) -> dict[str, Any]:
        """Ask in a process, so that this one never holds a device.

        Raises:
            OptionError: there is no such device.
        """
        try:
            return child.ask("headinfer.evaluate.answers.worker", {"device": device})
        except child.ChildError as error:
            raise OptionError(f"--device {device}: {death(error).reason}") from error

    def job(self, job: JobSpec) -> Iterator[Record | TrialFailure | str]:
        """Run a job; a process that dies is a failure."""
        try:
            for values in child.ask_for_many("headinfer.evaluate.answers.worker", job.to_json()):
                yield _given(values)
        except child.ChildError as error:
            yield death(error)

    def trial(self, spec: TrialSpec) -> Outcome:
        """Run one trial."""
        return FreshProcesses().trial(spec, time_limit_s=_TRIAL_LIMIT_S)


_TRIAL_LIMIT_S = 3600


def _given(values: child.Values) -> Record | TrialFailure | str:
    if "record" in values:
        return Record.from_json(values["record"])
    if "failure" in values:
        failure = from_json(values["failure"])
        assert isinstance(failure, TrialFailure)
        return failure
    note: str = values["note"]
    return note
