"""Where trials run: each in a fresh process, so that none disturbs the next. Pure Python."""

import signal
from dataclasses import dataclass, replace
from typing import Any, Protocol

from headinfer.bench import child
from headinfer.bench.bound import Rates
from headinfer.bench.catalogue import Spread
from headinfer.bench.result import Status, TrialFailure, TrialResult, from_json
from headinfer.bench.spec import TrialSpec
from headinfer.errors import OptionError

_TRIAL, _RANKED = "headinfer.bench.trial", "headinfer.bench.ranked"

Outcome = TrialResult | TrialFailure


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """A machine as measured.

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
    """A launcher runs things where they do not disturb each other."""

    def machine(self, device: str, dtype: str, gpus: int) -> Machine:
        """Measure the machine, with so many GPUs."""

    def identity(self, device: str) -> dict[str, Any]:
        """Return the kind of `device` that a run computes on, and its `hardware`."""

    def above_disk(self, machine: Machine, folder: str) -> Machine:
        """Measure the disk that a folder is on, too."""

    def trial(self, spec: TrialSpec, time_limit_s: float) -> Outcome:
        """Run one trial; end it when it takes longer."""


class FreshProcesses:
    """A new process for each thing."""

    def machine(self, device: str, dtype: str, gpus: int) -> Machine:
        """Measure the machine in a process, so that this one never holds a device."""
        question = {"device": device, "dtype": dtype, "gpus": gpus, "rates": True}
        answer = child.ask("headinfer.bench.machine", question)
        return Machine(**(answer | {"rates": Rates(**answer["rates"])}))

    def identity(self, device: str) -> dict[str, Any]:
        """Ask in a process, for the same reason."""
        return child.ask("headinfer.bench.machine", {"device": device, "rates": False})

    def above_disk(self, machine: Machine, folder: str) -> Machine:
        """Measure the disk in a process, after all else."""
        found = child.ask("headinfer.bench.machine_disk", {"folder": folder, "quick": False})
        if "refusal" in found:
            raise OptionError(found["refusal"])
        rates = replace(machine.rates, **found["rates"])
        by = machine.rates_by | {name: str(how) for name, how in found["rates_by"].items()}
        return replace(machine, rates=rates, rates_by=by)

    def trial(self, spec: TrialSpec, time_limit_s: float) -> Outcome:
        """Run one trial in a process; one that dies or takes too long is a failure."""
        try:
            module = _RANKED if spec.spread is Spread.HEADS else _TRIAL
            answer = child.ask(module, spec.to_json(), time_limit_s=time_limit_s)
        except TimeoutError as error:
            return TrialFailure(status=Status.CANNOT_RUN, reason=str(error), grows=True)
        except child.ChildError as error:
            return death(error)
        return from_json(answer)


def death(error: child.ChildError) -> TrialFailure:
    """Return why a process ended without an answer."""
    if error.returncode == -signal.SIGKILL:
        reason = "killed by the system, most likely for lack of memory"
        return TrialFailure(status=Status.CANNOT_RUN, reason=reason, grows=True)
    if error.returncode == -signal.SIGABRT and "bad_alloc" in error.stderr:
        reason = "out of memory: the process was aborted"
        return TrialFailure(status=Status.CANNOT_RUN, reason=reason, grows=True)
    last = next(iter(reversed(error.stderr.strip().splitlines())), "no message")
    reason = f"the process ended with status {error.returncode}: {last}"
    return TrialFailure(status=Status.FAILED, reason=reason)
