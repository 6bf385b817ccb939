"""What a GGUF file stored, kept beside what was unpacked from it."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

_FILE = "gguf.json"
_SAID_SHARE = 0.01
"""Types with less of the bytes are not told: norms are in float32 in all files."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """A record of a file's weights.

    Attributes:
        types: by the file's names, the ones with most bytes first.
        num_bytes: of all of them.
    """

    types: tuple[str, ...]
    num_bytes: int


def write_stored(folder: Path, bytes_by_type: Mapping[str, int]) -> None:
    """Write how many bytes of each type there were into a folder that was unpacked."""
    (folder / _FILE).write_text(json.dumps({"bytes": dict(bytes_by_type)}), encoding="utf-8")


def read_stored(folder: Path) -> Stored:
    """Return what `write_stored` wrote."""
    found: dict[str, int] = json.loads((folder / _FILE).read_text(encoding="utf-8"))["bytes"]
    in_all = sum(found.values())
    most_first = sorted(found, key=lambda kind: (-found[kind], kind))
    told = tuple(kind for kind in most_first if found[kind] >= _SAID_SHARE * in_all)
    return Stored(types=told, num_bytes=in_all)
