"""Resident memory of this process, and its peak over a stretch of work."""

import ctypes
import gc
import resource
import sys
from contextlib import suppress
from pathlib import Path

import psutil

_PROC = Path("/proc/self")
_RESET_PEAK = "5"
"""Written to `clear_refs`, sets the high-water mark to what is resident now (`man 5 proc`)."""


def return_freed_memory() -> None:
    """Give memory that is no longer used back to the system, so that it does not hide growth."""
    gc.collect()
    with suppress(OSError, AttributeError):  # not glibc
        ctypes.CDLL(None).malloc_trim(0)


class PeakRss:
    """A measure of how resident memory grows from construction on; frees what can be freed first.

    Attributes:
        source: how the peak is found.
    """

    def __init__(self) -> None:
        return_freed_memory()
        self._start_bytes = int(psutil.Process().memory_info().rss)
        try:
            (_PROC / "clear_refs").write_text(_RESET_PEAK)
            self._status_bytes()
            self.source = "VmHWM, reset after the warm-up"
            self._resets = True
        except (OSError, ValueError):
            self.source = "ru_maxrss, over the whole process (an upper bound)"
            self._resets = False

    def restart(self) -> None:
        """Forget the peak so far, but not what was resident at the start."""
        if self._resets:
            return_freed_memory()
            (_PROC / "clear_refs").write_text(_RESET_PEAK)

    def growth_bytes(self) -> int:
        """Return the peak so far over what was resident at the start, in bytes."""
        if self._resets:
            peak_bytes = self._status_bytes()
        else:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            peak_bytes = peak if sys.platform == "darwin" else peak * 1024
        return max(peak_bytes - self._start_bytes, 0)

    @staticmethod
    def _status_bytes() -> int:
        for line in (_PROC / "status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
        raise ValueError("no VmHWM in /proc/self/status")
