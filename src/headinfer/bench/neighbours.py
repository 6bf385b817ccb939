"""What other programs took of the CPU meanwhile: timings on a busy machine mean little."""

import os
import time
from contextlib import suppress

import psutil


class Neighbours:
    """A watch over other programs, from construction on. Those that this one starts are its own."""

    def __init__(self) -> None:
        self._start_s = time.monotonic()
        self._busy_s = _busy_s()
        self._own_s = _own_s()

    def cpu_share(self) -> float:
        """Return the share of all cores' time that others used, from 0 to 1."""
        own_s = _own_s() - self._own_s
        others_s = _busy_s() - self._busy_s - own_s
        cores_s = (time.monotonic() - self._start_s) * (os.cpu_count() or 1)
        return min(max(others_s / cores_s, 0.0), 1.0)


def _own_s() -> float:
    """Return the CPU time of this process and of all it started, such as compilers."""
    ended = os.times()
    own_s = time.process_time() + ended.children_user + ended.children_system
    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):  # it ended meanwhile
            own_s += sum(child.cpu_times()[:4])  # its own, and of its children that ended
    return own_s


def _busy_s() -> float:
    times = psutil.cpu_times()
    return float(sum(times) - times.idle - getattr(times, "iowait", 0.0))
