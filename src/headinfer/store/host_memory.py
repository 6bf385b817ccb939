"""How much host memory there is, and how much of it can still be had."""

from pathlib import Path

import psutil

_CGROUP = Path("/sys/fs/cgroup")


def all_host_bytes() -> int:
    """Return the host memory of this machine, or of this process's container, in bytes."""
    total = int(psutil.virtual_memory().total)
    try:
        return min(total, int((_CGROUP / "memory.max").read_text()))
    except (OSError, ValueError):  # no control groups, or no limit
        return total


def available_host_bytes() -> int:
    """Return the host memory this process can still take, in bytes.

    What the system has free or can free, and no more than the control group of a container allows.
    """
    available = int(psutil.virtual_memory().available)
    try:
        limit = (_CGROUP / "memory.max").read_text().strip()
        used = int((_CGROUP / "memory.current").read_text())
        statistics = dict(
            line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines()
        )
        # Files read lately are counted as used, but are given back when memory is asked for.
        used -= int(statistics.get("inactive_file", 0)) + int(statistics.get("active_file", 0))
    except (OSError, ValueError):
        return available
    return available if limit == "max" else max(min(available, int(limit) - used), 0)
