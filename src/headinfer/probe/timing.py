"""How fast something runs: its best repeat, and its median."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

Operation = tuple[Callable[[], object], float]
"""Something to run, and the bytes or operations it takes."""

_LEAST_TRIES = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Speed:
    """A speed that repeats of one operation reached.

    Attributes:
        best_per_s: the fastest repeat: a ceiling, since whatever else the machine does only slows.
        typical_per_s: the median: what a prediction should count with.
    """

    best_per_s: float
    typical_per_s: float


def time_operation(
    operation: Operation, synchronize: Callable[[], object], *, seconds: float
) -> Speed:
    """Run an operation again and again, after one run that is not counted.

    Args:
        operation: what to run.
        synchronize: blocks until what was run is done.
        seconds: how long to go on, where the least tries take less.
    """
    run, amount = operation
    run()
    synchronize()
    taken_s: list[float] = []
    while len(taken_s) < _LEAST_TRIES or sum(taken_s) < seconds:
        start_s = time.perf_counter()
        run()
        synchronize()
        taken_s.append(time.perf_counter() - start_s)
    return Speed(
        best_per_s=amount / min(taken_s), typical_per_s=amount / statistics.median(taken_s)
    )


def fastest(
    operations: dict[str, Operation], synchronize: Callable[[], object], *, seconds: float
) -> tuple[Speed, str]:
    """Return the speed of the operation with the best repeat, and its name.

    Args:
        operations: several ways of doing the same.
        synchronize: blocks until what was run is done.
        seconds: how long to try each.
    """
    speeds = {
        name: time_operation(operation, synchronize, seconds=seconds)
        for name, operation in operations.items()
    }
    best = max(speeds, key=lambda name: speeds[name].best_per_s)
    return speeds[best], best
