"""The file in the user's cache folder that keeps what `headinfer probe` measured."""

import dataclasses
import json
import logging
import math
import tempfile
from pathlib import Path
from typing import Any, TypeVar

from headinfer.errors import OptionError
from headinfer.folders import cache_folder
from headinfer.plan.hardware import Hardware
from headinfer.plan.measurement import Identity, Measurement, Quantity, Rate

_logger = logging.getLogger(__name__)

FORMAT = 1
"""Raised when a field changes its meaning; a file of another format is not read."""

_Record = TypeVar("_Record", Identity, Measurement, Rate)


def measurement_path() -> Path:
    """Return where the measurement is kept, whether or not there is one."""
    return cache_folder() / "machine.json"


def load_measured(identity: Identity | None = None) -> Hardware | None:
    """Return this machine as the planner sees it.

    Args:
        identity: of the machine as it is now; what was measured on another is then ignored.

    Returns:
        None when this machine was never probed, or the file cannot be used; a warning says why.
    """
    measurement = read_measurement(identity)
    return measurement.hardware if measurement else None


def read_measurement(identity: Identity | None = None) -> Measurement | None:
    """Return everything that was measured; see `load_measured`."""
    path = measurement_path()
    try:
        measurement = from_json(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        _logger.warning("%s cannot be used (%s): run `headinfer probe` again", path, error)
        return None
    if identity is not None and not identity.matches(measurement.identity):
        _logger.info("%s was measured on another machine and is ignored", path)
        return None
    return measurement


def check_writable() -> None:
    """Refuse early where a measurement could not be kept.

    Raises:
        OptionError: the cache folder cannot be written to.
    """
    folder = measurement_path().parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise _not_writable(folder, error) from error


def save_measurement(measurement: Measurement) -> Path:
    """Keep a measurement in place of the last one, and return where.

    Written beside the old file and renamed, so that nobody ever reads half of it.

    Raises:
        OptionError: the cache folder cannot be written to.
    """
    path = measurement_path()
    text = json.dumps(to_json(measurement), indent=1) + "\n"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as name:
            written = Path(name) / path.name
            written.write_text(text, encoding="utf-8")
            written.replace(path)
    except OSError as error:
        raise _not_writable(path.parent, error) from error
    return path


def _not_writable(folder: Path, error: OSError) -> OptionError:
    return OptionError(
        f"the measurement cannot be kept in {str(folder)!r} ({error.strerror}); "
        "set XDG_CACHE_HOME to a folder that can be written to"
    )


def to_json(measurement: Measurement) -> dict[str, Any]:
    """Return a measurement as JSON values."""
    rates = [
        dataclasses.asdict(rate) | {"quantity": rate.quantity.value} for rate in measurement.rates
    ]
    return {"format": FORMAT} | dataclasses.asdict(measurement) | {"rates": rates}


def from_json(values: Any) -> Measurement:
    """Return the measurement that `to_json` made these values of.

    Raises:
        ValueError: they are damaged, of another format, or lack what the planner needs.
    """
    if not isinstance(values, dict):
        raise ValueError("not a JSON object")
    if values.get("format") != FORMAT:
        raise ValueError(f"its format is {values.get('format')!r}, not {FORMAT}")
    versions, rates = values.get("versions"), values.get("rates")
    if not isinstance(versions, dict) or not isinstance(rates, list):
        raise ValueError("versions or rates are missing")
    measurement = _record(
        Measurement,
        values,
        identity=_record(Identity, values.get("identity")),
        versions={name: str(version) for name, version in versions.items()},
        rates=tuple(_rate(rate) for rate in rates),
    )
    if measurement.missing:
        raise ValueError(f"it lacks {', '.join(rate.value for rate in measurement.missing)}")
    return measurement


def _rate(values: Any) -> Rate:
    quantity = Quantity(values.get("quantity") if isinstance(values, dict) else None)
    return _record(Rate, values, quantity=quantity)


def _record(kind: type[_Record], values: Any, **made: Any) -> _Record:
    """Build a dataclass of plain fields, checking the type of each; `made` are those that are not.

    Numbers are sizes and rates: all must be finite and positive.
    """
    for field in dataclasses.fields(kind):
        if field.name in made:
            continue
        if not isinstance(values, dict) or field.name not in values:
            raise ValueError(f"{field.name} is missing")
        value = made[field.name] = values[field.name]
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not isinstance(value, field.type) or (number and not 0 < value < math.inf):  # type: ignore[arg-type]  # no annotation here is text
            raise ValueError(f"{field.name} is {value!r}")
    return kind(**made)
