"""Reading a session's files: one after another, each checked before anybody sees it."""

import concurrent.futures
import contextlib
import os
import zlib
from collections.abc import Generator, Sequence
from pathlib import Path

import torch

from headinfer.errors import SessionFileError
from headinfer.folders import describe
from headinfer.saved.folder import session_name
from headinfer.saved.index import FileEntry
from headinfer.saved.layout import tensors_in
from headinfer.units import counted

_BUFFERS = 2
"""While what is in one is used the other is filled."""


class DamagedFileError(SessionFileError):
    """A file of a session is missing, cut off or changed."""


def read_files(
    path: str | os.PathLike[str], entries: Sequence[FileEntry]
) -> Generator[dict[str, torch.Tensor], None, None]:
    """Yield the tensors of files, each valid until the next is asked for.

    The next file is read meanwhile. The iterator is to be closed.

    Args:
        path: of the session.
        entries: of the files, in the order in which they are to be read.

    Raises:
        DamagedFileError: names the file, and what is wrong with it.
        SessionFileError: a file cannot be read.
    """
    name, folder = session_name(path), Path(path)
    size = max((entry.num_bytes for entry in entries), default=0)
    buffers = [torch.empty(size, dtype=torch.uint8) for _ in entries[:_BUFFERS]]
    pool = concurrent.futures.ThreadPoolExecutor(1, "headinfer-session-reader")
    coming: list[concurrent.futures.Future[int]] = []
    try:
        for number, entry in enumerate(entries):
            last = number + 1 == len(entries)
            if not coming:
                coming.append(pool.submit(_read_file, folder, entry, buffers[0]))
            read_bytes = _result(coming.pop(), name, entry)
            if not last:  # what was handed out before is no longer used
                coming.append(pool.submit(_read_file, folder, entries[number + 1], buffers[1]))
            yield _checked(buffers[0][: entry.num_bytes], read_bytes, name, entry)
            buffers.reverse()
    finally:
        with contextlib.suppress(BaseException):
            pool.shutdown(wait=True, cancel_futures=True)


def _result(read: concurrent.futures.Future[int], name: str, entry: FileEntry) -> int:
    try:
        return read.result()
    except FileNotFoundError:
        raise DamagedFileError(f"{entry.file} of session {name!r} is missing") from None
    except OSError as error:
        raise DamagedFileError(f"session {name!r} cannot be read: {describe(error)}") from error


def _read_file(folder: Path, entry: FileEntry, buffer: torch.Tensor) -> int:
    """Read a file to a buffer; return its bytes, or one more than expected where it has more."""
    view, done = buffer[: entry.num_bytes].numpy().data, 0
    with open(folder / entry.file, "rb", buffering=0) as file:
        while done < entry.num_bytes and (read := file.readinto(view[done:])):
            done += read
        return done + len(file.read(1))


def _checked(
    data: torch.Tensor, read_bytes: int, name: str, entry: FileEntry
) -> dict[str, torch.Tensor]:
    if read_bytes != entry.num_bytes:
        told = "cut off" if read_bytes < entry.num_bytes else "too long"
        raise DamagedFileError(
            f"{entry.file} of session {name!r} is {told}: it should have "
            f"{counted(entry.num_bytes, 'byte')}"
            + (f" and has {read_bytes:,}" if told == "cut off" else "")
        )
    if zlib.crc32(data.numpy().data) != entry.crc32:
        raise DamagedFileError(
            f"{entry.file} of session {name!r} is damaged: its checksum is not the one it had"
        )
    try:
        return tensors_in(data)
    except ValueError as error:
        raise DamagedFileError(f"{entry.file} of session {name!r} is damaged: {error}") from error
