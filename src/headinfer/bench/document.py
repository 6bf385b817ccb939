"""The result file: one JSON object with a `header`, `checks` and `rows`. Pure Python.

It is written anew after every trial, so that a run that is stopped can go on. Until a row is
finished its trials are in `unfinished`, which no table reads.
"""

import os
import platform
import subprocess
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, ClassVar

from headinfer.bench.arranging import arranged
from headinfer.bench.bound import Rates
from headinfer.bench.files import ResultFile, check_continues, joined
from headinfer.bench.gate import Verdict
from headinfer.bench.held import HeldPart
from headinfer.bench.launch import Machine
from headinfer.bench.model_spec import Model, ModelSpec
from headinfer.bench.result import Status, TrialFailure, from_json, to_json
from headinfer.bench.rows import Percentiles, Row
from headinfer.bench.spec import BenchSpec, Fill, json_values
from headinfer.bench.suite import Check
from headinfer.bench.unfinished import Ended, Unfinished
from headinfer.bench.variant import Variant, variant_of

FORMAT = 2
"""Raised when a field changes its meaning."""

_MAY_DIFFER = ("methods", "kv_caches", "contexts", "time_limit_s")
"""What of a run's spec may be another where a run goes on with the rows of an earlier one."""


@dataclass(slots=True, kw_only=True)
class Results(ResultFile):
    """A run and what it has found so far.

    Attributes:
        spec: what is measured.
        machine: where.
        header: what the rows share.
        rows: finished ones, in any order.
        checks: those before timing, by the names of variants.
        unfinished: trials of rows that are not finished.
    """

    version: ClassVar[int] = FORMAT
    verb: ClassVar[str] = "bench"

    spec: BenchSpec
    machine: Machine
    header: dict[str, Any]
    rows: list[Row] = field(default_factory=list)
    checks: dict[str, Check] = field(default_factory=dict)
    unfinished: Unfinished = field(default_factory=Unfinished)

    @classmethod
    def new(cls, spec: BenchSpec, machine: Machine) -> "Results":
        """Return those of a run that begins."""
        return cls(spec=spec, machine=machine, header=header(spec, machine))

    @property
    def arranged_rows(self) -> list[Row]:
        """The rows in the order of a table, with ratios."""
        return arranged(self.spec, self.rows)

    @property
    def done(self) -> set[tuple[Variant, int]]:
        """Variant and context of the rows that need not be measured again."""
        return {
            (row.variant, row.context_tokens)
            for row in self.rows
            if row.status is not Status.FAILED
        }

    def to_json(self) -> dict[str, Any]:
        """Return the content of a result file."""
        checks = {
            name: asdict(check) | {"ran": isinstance(check, Verdict)}
            for name, check in self.checks.items()
        }
        parts: dict[str, Any] = {
            "header": self.header,
            "checks": checks,
            "rows": [asdict(row) for row in self.arranged_rows],
        }
        reference = self.unfinished.reference
        if self.unfinished or reference:
            parts["unfinished"] = {
                "reference": reference and _ended_values(reference),
                "trials": [_ended_values(trial) for trial in self.unfinished],
            }
        values: dict[str, Any] = json_values(parts)
        return values

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Results":
        """Return the results that `to_json` gave."""
        head = values["header"]
        spec = BenchSpec.from_json(head["spec"])
        return cls(
            spec=spec,
            machine=Machine(
                device=head["device"],
                hardware=head["hardware"],
                rates=Rates(**head["rates"]),
                rates_by=head["rates_by"],
            ),
            header=head,
            rows=[_row(row, spec) for row in values["rows"]],
            checks={name: _check(check) for name, check in values["checks"].items()},
            unfinished=_unfinished(values.get("unfinished")),
        )

    def continued(self, spec: BenchSpec, identity: Mapping[str, Any]) -> "Results":
        """Return these results as the beginning of another run, here and now.

        Methods, forms and contexts may be others; all else must be as it was. What failed is left
        out, to be tried again. So are trials that did not run while they might take less time.

        Args:
            spec: of the other run.
            identity: kind of `device`, and `hardware`, that it runs on.

        Raises:
            OptionError: the runs differ, so that their rows do not belong into one file.
        """
        now = header(spec, replace(self.machine, **identity))
        check_continues(self.header, now, but={*_MAY_DIFFER})
        forms = tuple(dict.fromkeys((*spec.kv_caches, *self.spec.kv_caches)))
        whole = replace(joined(spec, self.spec), kv_caches=forms)
        rows = [row for row in self.rows if row.status is not Status.FAILED]
        checks = {name: check for name, check in self.checks.items() if not _failed(check)}
        reference = self.unfinished.reference
        longer = spec.time_limit_s > self.spec.time_limit_s

        def stays(trial: Ended) -> bool:
            failed = isinstance(trial.outcome, TrialFailure)
            return not (_failed(trial.outcome) or (longer and failed))

        return replace(
            self,
            spec=whole,
            header=self.header | {"spec": whole.to_json()},
            rows=rows,
            checks=checks,
            unfinished=Unfinished(
                filter(stays, self.unfinished),
                reference if reference is not None and stays(reference) else None,
            ),
        )


def _failed(ended: object) -> bool:
    """Whether a trial or a check ended by an error that is nobody's limit, and may not recur."""
    return isinstance(ended, TrialFailure) and ended.status is Status.FAILED


def header(spec: BenchSpec, machine: Machine) -> dict[str, Any]:
    """Return what the rows share: where, when and with what they were measured."""
    return {
        "format": FORMAT,
        "command": spec.command.value,
        **provenance(),
        "device": machine.device,
        "hardware": machine.hardware,
        "rates": asdict(machine.rates),
        "rates_by": machine.rates_by,
        "model": model_values(spec.model),
        "dtype": spec.dtype,
        "seed": spec.seed,
        "repeats": spec.repeats,
        "new_tokens": spec.new_tokens,
        "settings": spec.settings.keywords() | {"kv_cache": ",".join(spec.kv_caches)},
        "spec": spec.to_json(),
    }


def provenance() -> dict[str, Any]:
    """Return when something is measured, and with which code."""
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": {
            "python": platform.python_version(),
            **{name: version_of(name) for name in ("torch", "transformers", "headinfer")},
        },
        "commit": _commit(),
    }


def model_values(model: Model) -> dict[str, Any]:
    """Return what a header says of a model."""
    values: dict[str, Any] = {"description": model.description}
    if isinstance(model, ModelSpec):
        return values | asdict(model) | {"parameters": model.parameters}
    return values | {"name": model.name, "layers": model.layers, "vocab_size": model.vocab_size}


def _check(values: Mapping[str, Any]) -> Check:
    rest = {name: value for name, value in values.items() if name != "ran"}
    if values["ran"]:
        return _verdict(rest)
    return TrialFailure(**(rest | {"status": Status(rest["status"])}))


def _verdict(values: Mapping[str, Any]) -> Verdict:
    error = values["logits_error"]
    return Verdict(**(dict(values) | {"logits_error": float("nan") if error is None else error}))


def _unfinished(values: Mapping[str, Any] | None) -> Unfinished:
    if values is None:
        return Unfinished()
    reference = values["reference"]
    return Unfinished(map(_ended, values["trials"]), reference and _ended(reference))


def _ended_values(trial: Ended) -> dict[str, Any]:
    return asdict(trial) | {"outcome": to_json(trial.outcome)}


def _ended(values: Mapping[str, Any]) -> Ended:
    return Ended(
        variant=Variant(**values["variant"]),
        context_tokens=values["context_tokens"],
        outcome=from_json(values["outcome"]),
        verdict=values["verdict"] and _verdict(values["verdict"]),
    )


def _row(values: Mapping[str, Any], spec: BenchSpec) -> Row:
    """Return a row of a run; those of runs with one form did not name it."""
    only = variant_of(values["method"], spec.kv_caches[0])
    parts = {
        "kv_cache": values.get("kv_cache", only.kv_cache),
        "status": Status(values["status"]),
        "fill": Fill(values["fill"]),
        "gate": values["gate"] and _verdict(values["gate"]),
        "parts": tuple(HeldPart(**part) for part in values.get("parts", ())),
        "tried": tuple((tokens, how) for tokens, how in values["tried"]),
        "prefill_samples_s": tuple(values["prefill_samples_s"]),
        "decode_samples_s": tuple(map(tuple, values["decode_samples_s"])),
    }
    for name in ("prefill_percentiles", "decode_percentiles"):
        parts[name] = values[name] and Percentiles(**values[name])
    return Row(**(dict(values) | parts))


def version_of(name: str) -> str | None:
    """Return the version of an installed package; None where it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:  # running from a source tree that was not installed
        return None


_COMMIT = "HEADINFER_COMMIT"
"""Environment variable that names the commit of a copy of the tree without its history."""


def _commit() -> dict[str, Any] | None:
    """Return the commit of this source tree, and whether it was changed; None outside of one."""
    if named := os.environ.get(_COMMIT):
        return {"id": named, "changed": False}
    folder = Path(__file__).parent
    tracked = _git(folder, "ls-files", "--error-unmatch", "../__init__.py")
    commit = _git(folder, "rev-parse", "HEAD") if tracked else None
    if not commit:
        return None
    changes = _git(folder, "status", "--porcelain", "--", "..")
    return {"id": commit, "changed": bool(changes)}


def _git(folder: Path, *arguments: str) -> str | None:
    command = ["git", "--no-optional-locks", "-C", str(folder), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
