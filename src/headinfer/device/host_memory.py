"""How much host memory there is, and how much of it can still be had."""

import contextlib
import functools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import psutil

_PROC = Path("/proc")
_CGROUP = Path("/sys/fs/cgroup")

_MOST_BYTES = 2**16
"""More than any of the files read here has. The kernel gives all of such a file at once."""

_RECLAIMED_LATE = ("Mapped", "Dirty", "Writeback")
"""Files' pages that the system counts as available, and that are not.

The pages of programs at work, and of weights that are read where they lie, would be read from disk
again and again. The other pages must be written first.
"""


def all_host_bytes() -> int:
    """Return the host memory of this machine, or of this process's container, in bytes."""
    total = _meminfo().get("MemTotal") or int(psutil.virtual_memory().total)
    return min([total, *(group.limit_bytes for group in _control_groups())])


def available_host_bytes() -> int:
    """Return the host memory this process can still take, in bytes.

    It is what the system has free, or can free without reading it again at once. It is no more than
    the control groups that this process is in allow. The watermarks below which the kernel does not
    let memory fall are no part of what it calls available.
    """
    memory = _meminfo()
    available = memory.get("MemAvailable")
    if available is None:
        available = int(psutil.virtual_memory().available)
    else:
        files = memory.get("Active(file)", 0) + memory.get("Inactive(file)", 0)
        available -= min(sum(memory.get(name, 0) for name in _RECLAIMED_LATE), files)
    return max(min([available, *(group.available_bytes for group in _control_groups())]), 0)


def _meminfo() -> dict[str, int]:
    """Return Linux's own account of the memory, in bytes; empty on other systems."""
    values = {}
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in _text(f"{_PROC}/meminfo").splitlines():
            name, value = line.split(":")
            values[name] = int(value.split()[0]) * 1024
    return values


class _Names(NamedTuple):
    """A version of control groups: what it calls its files, and what it counts in `memory.stat`."""

    limits: tuple[str, ...]
    used: str
    files: tuple[str, ...]
    late: tuple[str, ...]


_VERSIONS = (
    # From its second limit on, the system slows processes down instead of ending them.
    _Names(
        limits=("memory.max", "memory.high"),
        used="memory.current",
        files=("active_file", "inactive_file"),
        late=("file_mapped", "file_dirty", "file_writeback"),
    ),
    _Names(
        limits=("memory.limit_in_bytes",),
        used="memory.usage_in_bytes",
        files=("total_active_file", "total_inactive_file"),
        late=("total_mapped_file", "total_dirty", "total_writeback"),
    ),
)


class _Group(NamedTuple):
    """A control group that limits memory: the most it may take, and what of that is left."""

    limit_bytes: int
    available_bytes: int


def _control_groups() -> Iterator[_Group]:
    """Yield the limits on this process: those of its control group and of all that one is in."""
    for folder, names in _group_folders(_PROC, _CGROUP):
        if (group := _read_group(folder, names)) is not None:
            yield group


@functools.cache
def _group_folders(proc: Path, cgroup: Path) -> tuple[tuple[Path, _Names], ...]:
    """Return where groups that this process is in tell what they use; found once.

    Every new cache asks, and a process that is moved to another group is a rare thing.

    Args:
        proc: where the system tells of processes.
        cgroup: where it has control groups.
    """
    folders: dict[Path, None] = {}
    for mount, own in _memberships(proc, cgroup):
        folders.update(dict.fromkeys((mount / own, *(mount / above for above in own.parents))))
        folders[mount] = None  # a container may see its own group there, under another name
    return tuple(
        (folder, names)
        for folder in folders
        for names in _VERSIONS
        if os.path.exists(folder / names.used)  # a path's own method raises without permission
    )


def _memberships(proc: Path, cgroup: Path) -> Iterator[tuple[Path, Path]]:
    """Yield where control groups may be mounted, and the path below it of this process's own."""
    lines = []
    with contextlib.suppress(OSError):
        lines = (proc / "self" / "cgroup").read_text().splitlines()
    for line in lines or ["0::/", "1:memory:/"]:
        _number, controllers, own = line.split(":", 2)
        path = Path(*(part for part in own.split("/") if part not in ("", "..")))
        if not controllers:
            yield cgroup, path
        elif "memory" in controllers.split(","):
            yield cgroup / "memory", path


def _read_group(folder: Path, names: _Names) -> _Group | None:
    """Return a group's limit and what is left of it; None where it has none, or does not tell."""
    where, limits = str(folder), []
    try:
        for name in names.limits:
            with contextlib.suppress(FileNotFoundError):
                limits.append(_text(f"{where}/{name}"))
        limit = min([int(text) for text in limits if text != "max"])
        used = int(_text(f"{where}/{names.used}"))
        counts = dict([line.split() for line in _text(f"{where}/memory.stat").splitlines()])
    except (OSError, ValueError):
        return None
    # Files read lately are counted as used, but are given back when memory is asked for.
    files = sum(int(counts.get(name, 0)) for name in names.files)
    late = sum(int(counts.get(name, 0)) for name in names.late)
    return _Group(limit, limit - used + files - min(late, files))


def _text(path: str) -> str:
    """Return what a file of the kernel's tells, in as few system calls as may be.

    Every new cache asks, before a prompt's first kernel. A file object makes twice as many.
    """
    opened = os.open(path, os.O_RDONLY)
    try:
        return os.read(opened, _MOST_BYTES).decode().strip()
    finally:
        os.close(opened)
