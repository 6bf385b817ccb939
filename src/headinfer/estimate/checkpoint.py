"""The bytes of a checkpoint's tensors, from the headers of its safetensors files. Pure Python."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

from headinfer.errors import ModelLoadError

_LENGTH_BYTES = 8
_MOST_HEADER_BYTES = 100 * 2**20
"""The format allows no longer header."""

_PLAIN = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2}
_PLAIN_NAMES = ("weight", "bias")
"""Tensors of these kinds are loaded in the model's dtype; scales and codes stay as they are."""

_INDEX = "model.safetensors.index.json"


def checkpoint_bytes(folder: Path, itemsize: int, *, tied: bool) -> int | None:
    """Return the bytes that a folder's weights take once loaded; None without safetensors files.

    Quantised tensors and their scales count as they are stored.

    Args:
        folder: of the model.
        itemsize: bytes of an element of what is not quantised.
        tied: whether the output matrix is the embedding, also where the file has both.

    Raises:
        ModelLoadError: a file is damaged.
    """
    files = list(_files(folder))
    if not files:
        return None
    total = 0
    for file in files:
        for name, dtype, stored in _tensors(file):
            if tied and name == "lm_head.weight":
                continue
            plain = _PLAIN.get(dtype) if name.rpartition(".")[2] in _PLAIN_NAMES else None
            total += stored if plain is None else stored // plain * itemsize
    return total


def _files(folder: Path) -> Iterator[Path]:
    """Yield the files that an index names, or the one there is without."""
    index = folder / _INDEX
    if not index.is_file():
        single = folder / "model.safetensors"
        yield from [single] if single.is_file() else []
        return
    try:
        named = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        files = [folder / os.path.basename(each) for each in sorted(named)]
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise ModelLoadError(f"{str(index)!r} is damaged: fetch it again") from error
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise ModelLoadError(f"{str(folder)!r} lacks {missing[0]}, which {_INDEX} names")
    yield from files


def _tensors(file: Path) -> Iterator[tuple[str, str, int]]:
    """Yield the name, dtype and bytes of each tensor of a file."""
    try:
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(_LENGTH_BYTES), "little")
            if not 0 < length <= _MOST_HEADER_BYTES:
                raise ValueError("its header has no such length")
            header = json.loads(opened.read(length).decode())
            if file.stat().st_size < _LENGTH_BYTES + length:
                raise ValueError("it ends within its header")
        for name, tensor in header.items():
            if name != "__metadata__":
                begin, end = tensor["data_offsets"]
                yield name, str(tensor["dtype"]), int(end) - int(begin)
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        reason = getattr(error, "strerror", None) or "its header is damaged: fetch it again"
        raise ModelLoadError(f"{str(file)!r} cannot be read: {reason}") from error
