"""The processor's caches: what memory is measured with must be larger."""

from pathlib import Path

_CPUS = Path("/sys/devices/system/cpu")
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30}

_UNKNOWN_BYTES = 64 * 2**20
"""Where the system does not tell: as much as large desktop processors have."""


def last_level_cache_bytes(cpus: Path = _CPUS) -> int:
    """Return the bytes of all the caches next to memory, which a machine may have several of.

    Args:
        cpus: the folder in which Linux describes the processors.
    """
    levels: dict[int, dict[str, int]] = {}  # of each level: sizes, by the processors that share one
    for folder in cpus.glob("cpu[0-9]*/cache/index[0-9]*"):
        try:
            level, size, shared = (
                (folder / name).read_text().strip() for name in ("level", "size", "shared_cpu_list")
            )
            caches = levels.setdefault(int(level), {})
            caches[shared] = int(size[:-1]) * _UNITS[size[-1:]]
        except (OSError, ValueError, LookupError):
            continue
    known = [level for level, caches in levels.items() if caches]
    return sum(levels[max(known)].values()) if known else _UNKNOWN_BYTES
