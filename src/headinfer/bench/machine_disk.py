"""What the disk of a run can do, measured in a fresh process."""

from typing import Any

from headinfer.errors import HeadInferError
from headinfer.probe.disk import how, measure_disk


def answer(values: dict[str, Any]) -> dict[str, Any]:
    """Return the rates of the disk that a folder is on, or why there are none.

    See `headinfer.bench.child`. The best stretch counts in reading: a bound that the measured code
    could beat would be none.
    """
    folder: str = values["folder"]
    try:
        rate = measure_disk(folder, quick=values["quick"])
    except HeadInferError as error:
        return {"refusal": str(error)}
    rates = {
        "disk_read_bytes_per_s": rate.best_read_bytes_per_s,
        "disk_write_bytes_per_s": rate.write_bytes_per_s,
    }
    return {"rates": rates, "rates_by": dict.fromkeys(rates, how(rate, folder))}
