"""What other programs took of the CPU meanwhile: timings on a busy machine mean little."""

import os
import time

import psutil


class Neighbours:
    """A watch over other programs, from construction on."""

    def __init__(self) -> None:
        self._start_s = time.monotonic()
        self._busy_s = _busy_s()
        self._own_s = time.process_time()

    def cpu_share(self) -> float:
        """Return the share of all cores' time that others used, from 0 to 1."""
        own_s = time.process_time() - self._own_s
        others_s = _busy_s() - self._busy_s - own_s
        cores_s = (time.monotonic() - self._start_s) * (os.cpu_count() or 1)
        return min(max(others_s / cores_s, 0.0), 1.0)


def _busy_s() -> float:
    times = psutil.cpu_times()
    return float(sum(times) - times.idle - getattr(times, "iowait", 0.0))
