"""The processor's caches: what is read to measure memory must be larger."""

import os
from pathlib import Path

from headinfer.device.host_memory import available_host_bytes

_CPUS = Path("/sys/devices/system/cpu")
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30}

_UNKNOWN_BYTES = 64 * 2**20
"""Where the system does not tell: as much as large desktop processors have."""

_TIMES_THE_CACHES = 4
_MOST_OF_FREE = 1 / 16
"""Share of free host memory for one of a few buffers: a machine with less is measured all the
same."""


def beyond_caches(least_bytes: int) -> int:
    """Return the bytes of a buffer that is read from memory, whatever the caches keep.

    A server's cache of 300 MiB held all that was read, and made its memory appear twice as fast as
    a KV cache is read.

    Args:
        least_bytes: to be taken in any case.
    """
    wanted = _TIMES_THE_CACHES * last_level_cache_bytes()
    return max(least_bytes, min(wanted, int(_MOST_OF_FREE * available_host_bytes())))


def last_level_cache_bytes(cpus: Path = _CPUS) -> int:
    """Return the bytes of all the caches next to memory that this process's processors share.

    Args:
        cpus: the folder in which Linux describes the processors.
    """
    levels: dict[int, dict[str, int]] = {}  # of each level: sizes, by the processors that share one
    for cpu in os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else ():
        for folder in (cpus / f"cpu{cpu}" / "cache").glob("index[0-9]*"):
            try:
                level, size, shared = (
                    (folder / name).read_text().strip()
                    for name in ("level", "size", "shared_cpu_list")
                )
                caches = levels.setdefault(int(level), {})
                caches[shared] = int(size[:-1]) * _UNITS[size[-1:]]
            except (OSError, ValueError, LookupError):
                continue
    known = [level for level, caches in levels.items() if caches]
    return sum(levels[max(known)].values()) if known else _UNKNOWN_BYTES
