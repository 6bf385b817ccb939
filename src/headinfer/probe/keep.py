"""Keeping what was measured, in the file that plans read."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from headinfer.errors import OptionError
from headinfer.folders import describe, private_folder
from headinfer.plan.measured import FORMAT, NAME, measurement_path
from headinfer.plan.measurement import Measurement
from headinfer.scratch import scratch_folder


def check_writable() -> None:
    """Refuse early where a measurement could not be kept.

    Raises:
        OptionError: the cache folder cannot be written to, or others can.
    """
    try:
        with scratch_folder(private_folder()):
            pass
    except OSError as error:
        raise _not_writable(error) from error


def save_measurement(measurement: Measurement) -> Path:
    """Keep a measurement in place of the last one, and return where.

    Written beside the old file and renamed, so that nobody ever reads half of it.

    Raises:
        OptionError: the cache folder cannot be written to, or others can.
    """
    text = json.dumps(to_json(measurement), indent=1) + "\n"
    try:
        path = private_folder() / NAME
        with scratch_folder(path.parent) as folder:
            written = folder / path.name
            written.write_text(text, encoding="utf-8")
            written.chmod(0o600)
            written.replace(path)
    except OSError as error:
        raise _not_writable(error) from error
    return measurement_path()


def _not_writable(error: OSError) -> OptionError:
    return OptionError(
        f"the measurement cannot be kept ({describe(error)}); "
        "set XDG_CACHE_HOME to a folder that only you can write to"
    )


def to_json(measurement: Measurement) -> dict[str, Any]:
    """Return a measurement as JSON values."""
    rates = [
        dataclasses.asdict(rate) | {"quantity": rate.quantity.value} for rate in measurement.rates
    ]
    values = dataclasses.asdict(measurement)
    return {"format": FORMAT} | values | {"rates": rates, "disks": list(values["disks"])}
