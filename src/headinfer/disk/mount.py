"""The disk that a folder is on: its name, its file system and its free space. Without torch."""

import os
import re
from pathlib import Path
from typing import NamedTuple

_IN_MEMORY = ("tmpfs", "ramfs")


class Mount(NamedTuple):
    """A mounted file system.

    Attributes:
        source: what it lies on, such as a device.
        kind: of file system.
    """

    source: str
    kind: str

    @property
    def disk(self) -> str:
        """What tells its disk from others."""
        return f"{self.source} {self.kind}".strip()

    @property
    def in_memory(self) -> bool:
        """Whether its files are in CPU memory."""
        return self.kind in _IN_MEMORY

    @property
    def said(self) -> str:
        """The file system for people."""
        return f"in memory ({self.kind})" if self.in_memory else self.kind


def mount_of(folder: str) -> Mount:
    """Return where a folder lies; of unknown kind where the system does not tell."""
    path = os.path.realpath(folder)
    found, longest = Mount(f"device {os.stat(path).st_dev}", "unknown"), ""
    try:
        lines = Path("/proc/self/mountinfo").read_text(errors="replace").splitlines()
    except OSError:
        return found
    for line in lines:
        before, _, behind = line.partition(" - ")
        there, (kind, source, *_) = _unescaped(before.split()[4]), behind.split()
        inside = path == there or path.startswith(there.rstrip("/") + "/")
        if inside and len(there) >= len(longest):  # later ones hide earlier ones
            found, longest = Mount(_unescaped(source), kind), there
    return found


def free_bytes(folder: str) -> int:
    """Return the bytes that a file in a folder can still take."""
    found = os.statvfs(folder)
    return found.f_bavail * found.f_frsize


def _unescaped(text: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), text)
