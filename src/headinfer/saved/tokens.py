"""The token ids of a saved session, read without its keys and values."""

import json
import os
from pathlib import Path

import numpy as np
import torch

from headinfer.errors import SessionFileError
from headinfer.folders import describe
from headinfer.saved.folder import session_name
from headinfer.saved.index import Index

_LENGTH_BYTES = 8
TOKEN_IDS = "token_ids"


def read_token_ids(path: str | os.PathLike[str], index: Index) -> torch.Tensor:
    """Return the ids of a session's tokens.

    Nothing is checked by its checksum: whoever loads the session compares the ids that were.

    Args:
        path: of the session.
        index: of it.

    Returns:
        `[rows, tokens]` of int64.

    Raises:
        SessionFileError: it has no ids, or a page is missing, cut off or of another form.
    """
    name = session_name(path)
    if not index.with_ids:
        raise SessionFileError(f"session {name!r} has no token ids")
    parts = [
        _ids_of(Path(name) / page.entry.file, index.rows, page.tokens, name) for page in index.pages
    ]
    return torch.cat(parts, dim=1)


def _ids_of(file: Path, rows: int, tokens: int, name: str) -> torch.Tensor:
    try:
        with open(file, "rb") as page:
            length = int.from_bytes(page.read(_LENGTH_BYTES), "little")
            header = json.loads(page.read(min(length, 2**24)))
            first, last = header[TOKEN_IDS]["data_offsets"]
            page.seek(_LENGTH_BYTES + length + first)
            data = page.read(last - first)
    except OSError as error:
        raise SessionFileError(f"session {name!r} cannot be read: {describe(error)}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise SessionFileError(f"session {name!r} is damaged: {file.name} is no page") from error
    if len(data) != rows * tokens * np.dtype("<i8").itemsize:
        raise SessionFileError(f"session {name!r} is damaged: {file.name} is cut off")
    return torch.from_numpy(np.frombuffer(data, dtype="<i8").reshape(rows, tokens).copy())
