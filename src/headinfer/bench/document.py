"""The result file: one JSON object with a `header` and `rows`. Pure Python, never torch."""

import enum
import platform
import subprocess
from collections.abc import Iterable
from dataclasses import asdict
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from headinfer.bench.rows import Row
from headinfer.bench.spec import BenchSpec
from headinfer.bench.suite import Machine

FORMAT = 1
"""Raised when a field changes its meaning."""


def document(spec: BenchSpec, machine: Machine, rows: Iterable[Row]) -> dict[str, Any]:
    """Return a result file's content, JSON values only."""
    return {"header": header(spec, machine), "rows": [_json(asdict(row)) for row in rows]}


def header(spec: BenchSpec, machine: Machine) -> dict[str, Any]:
    """Return what the rows share: where, when and with what they were measured."""
    return {
        "format": FORMAT,
        "command": spec.command.value,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": {
            "python": platform.python_version(),
            **{name: _version(name) for name in ("torch", "transformers", "headinfer")},
        },
        "commit": _commit(),
        "device": machine.device,
        "hardware": machine.hardware,
        "rates": asdict(machine.rates),
        "rates_by": machine.rates_by,
        "model": {
            "architecture": "LlamaForCausalLM, random weights",
            **asdict(spec.model),
            "parameters": spec.model.layer_parameters + 2 * spec.model.head_parameters,
        },
        "dtype": spec.dtype,
        "seed": spec.seed,
        "repeats": spec.repeats,
        "new_tokens": spec.new_tokens,
        "settings": asdict(spec.settings),
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:  # running from a source tree that was not installed
        return None


def _commit() -> dict[str, Any] | None:
    """Return the commit of this source tree, and whether it was changed; None outside of one."""
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


def _json(value: Any) -> Any:
    """Return a value with enums as their values; NaN, which JSON lacks, as None."""
    if isinstance(value, dict):
        return {name: _json(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_json(part) for part in value]
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, float) and value != value:
        return None
    return value
