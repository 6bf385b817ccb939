"""The file in the user's cache folder that keeps what `headinfer probe` measured."""

import dataclasses
import json
import logging
from pathlib import Path
from typing import Any, TypeVar

from headinfer.checked_files import DamagedError, read_private
from headinfer.folders import cache_folder
from headinfer.plan.hardware import DiskRate, Hardware
from headinfer.plan.measurement import Identity, Measurement, Quantity, Rate

_logger = logging.getLogger(__name__)

FORMAT = 1
"""Raised when a field changes its meaning; a file of another format is not read."""

NAME = "machine.json"
_MAX_BYTES = 2**20
_SMALLEST, _LARGEST = 1e-12, 1e24
"""What sizes and rates of machines lie between; with others, arithmetic may end in an error."""

_Record = TypeVar("_Record", DiskRate, Identity, Measurement, Rate)


def measurement_path() -> Path:
    """Return where the measurement is kept, whether or not there is one.

    Raises:
        OSError: there is no folder to keep it in.
    """
    return cache_folder() / NAME


def load_measured(identity: Identity | None = None, disk: str | None = None) -> Hardware | None:
    """Return this machine as the planner sees it.

    Args:
        identity: of the machine as it is now; what was measured on another is then ignored.
        disk: below host memory, as `DiskRate` names it; None for no disk.

    Returns:
        None when this machine was never probed, or the file cannot be used; a warning says why.
    """
    measurement = read_measurement(identity)
    return measurement.hardware_above(disk) if measurement else None


def read_measurement(identity: Identity | None = None) -> Measurement | None:
    """Return everything that was measured; see `load_measured`."""
    try:
        path = measurement_path()
    except OSError:
        return None  # so none was ever kept
    try:
        measurement = _parse(read_private(path, _MAX_BYTES))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, DamagedError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        _logger.warning("%s cannot be used (%s): run `headinfer probe` again", path, reason)
        return None
    if identity is not None and not identity.matches(measurement.identity):
        _logger.info("%s was measured on another machine and is ignored", path)
        return None
    return measurement


def from_json(values: Any) -> Measurement:
    """Return the measurement that `headinfer.probe.keep.to_json` made these values of.

    Raises:
        ValueError: they are damaged, of another format, or lack what the planner needs.
    """
    if not isinstance(values, dict):
        raise ValueError("not a JSON object")
    if values.get("format") != FORMAT:
        raise ValueError(f"its format is {values.get('format')!r}, not {FORMAT}")
    versions, rates = values.get("versions"), values.get("rates")
    disks = values.get("disks", [])  # files from before disks were measured lack them
    if not isinstance(versions, dict) or not isinstance(rates, list):
        raise ValueError("versions or rates are missing")
    if not isinstance(disks, list):
        raise ValueError(f"disks is {disks!r}")
    measurement = _record(
        Measurement,
        values,
        identity=_record(Identity, values.get("identity")),
        versions={name: str(version) for name, version in versions.items()},
        rates=tuple(_rate(rate) for rate in rates),
        disks=tuple(_record(DiskRate, disk) for disk in disks),
    )
    if measurement.missing:
        raise ValueError(f"it lacks {', '.join(rate.value for rate in measurement.missing)}")
    return measurement


def _parse(content: bytes) -> Measurement:
    try:
        return from_json(json.loads(content.decode()))
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def _rate(values: Any) -> Rate:
    quantity = Quantity(values.get("quantity") if isinstance(values, dict) else None)
    return _record(Rate, values, quantity=quantity)


def _record(kind: type[_Record], values: Any, **made: Any) -> _Record:
    """Build a dataclass of plain fields, checking the type of each; `made` are those that are not.

    Numbers are sizes and rates: all must be positive, and none beyond those of any machine.
    """
    for field in dataclasses.fields(kind):
        if field.name in made:
            continue
        if not isinstance(values, dict) or field.name not in values:
            raise ValueError(f"{field.name} is missing")
        value = made[field.name] = values[field.name]
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not isinstance(value, field.type) or (number and not _SMALLEST < value < _LARGEST):  # type: ignore[arg-type]  # no annotation here is text
            raise ValueError(f"{field.name} is {value!r}")
    return kind(**made)
