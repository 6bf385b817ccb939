"""Files that are looked at before they are used: by owner, by kind, by a digest of their content.

A digest finds files cut short or overwritten by chance. Against other users it helps only in a
folder that they cannot write to (`headinfer.folders`).
"""

import contextlib
import hashlib
import os
import stat
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO

DIGESTS = "SHA256SUMS"
"""File of a sealed folder, in the format of the command `sha256sum`."""

_DIGEST_BYTES = hashlib.sha256().digest_size
_MAX_BYTES = 2**26
_BLOCK_BYTES = 2**20
_FILE_MODE = 0o600


class DamagedError(Exception):
    """A file, or a folder of files, is not what was written."""


def read_private(path: Path, max_bytes: int = _MAX_BYTES) -> bytes:
    """Return a file's content if nobody but this user and root can have written it.

    Args:
        path: of a regular file, and no link to one.
        max_bytes: the most that is read.

    Raises:
        OSError: it cannot be read.
        DamagedError: it is another user's, no regular file, or too large.
    """
    with _open_private(path) as file:
        content = file.read(max_bytes + 1)
    if len(content) > max_bytes:
        raise DamagedError(f"it has more than {max_bytes} bytes")
    return content


def write_sealed(path: Path, content: bytes) -> None:
    """Write a new file for this user alone: the content, and a digest of it and the file's name.

    Programs that know the end of what they read, such as a loader of libraries, need not know of
    the digest.
    """
    with _create(path) as file:
        file.write(content + _seal(path.name, content))


def check_sealed(path: Path) -> None:
    """Check that a file is what `write_sealed` wrote under this name.

    Raises:
        OSError: it cannot be read.
        DamagedError: it is not, or might be another user's.
    """
    whole = read_private(path)
    content, seal = whole[:-_DIGEST_BYTES], whole[-_DIGEST_BYTES:]
    if seal != _seal(path.name, content):
        raise DamagedError("its content is not what was written")


def seal_folder(folder: Path) -> None:
    """Close a folder of files to others, and add `DIGESTS`."""
    folder.chmod(0o700)
    lines = []
    for path in sorted(folder.iterdir()):
        path.chmod(_FILE_MODE)
        with path.open("rb") as opened:
            lines.append(f"{digest_of(opened)}  {path.name}\n")
    with _create(folder / DIGESTS) as file:
        file.write("".join(lines).encode())


def check_folder(folder: Path) -> None:
    """Check that a folder holds what it held when it was sealed; hidden files do not matter.

    Raises:
        OSError: it is not there, or cannot be read.
        DamagedError: a file is missing, added, changed, or might be another user's.
    """
    digests = {}
    for line in read_private(folder / DIGESTS).decode(errors="replace").splitlines():
        digest, _, name = line.partition("  ")
        if not name:
            raise DamagedError(f"{DIGESTS} is not what was written")
        digests[name] = digest
    names = {path.name for path in folder.iterdir() if not path.name.startswith(".")}
    for name in sorted(names ^ {*digests, DIGESTS}):
        raise DamagedError(f"{name} is {'not one of its files' if name in names else 'missing'}")
    for name, digest in digests.items():
        try:
            with _open_private(folder / name) as opened:
                found = digest_of(opened)
        except DamagedError as error:
            raise DamagedError(f"{name}: {error}") from error
        if found != digest:
            raise DamagedError(f"{name} is not what was written")


def digest_of(file: IO[bytes]) -> str:
    """Return the SHA-256 of the rest of a file, which may be larger than memory."""
    digest = hashlib.sha256()
    while block := file.read(_BLOCK_BYTES):
        digest.update(block)
    return digest.hexdigest()


@contextlib.contextmanager
def _open_private(path: Path) -> Iterator[IO[bytes]]:
    """Open a regular file, and no link to one, that nobody but this user and root can write to."""
    try:
        opened = open(path, "rb", opener=_open_as_it_is)  # noqa: SIM115  # closed below
    except OSError as error:
        if path.is_symlink():  # of which the system says "too many levels"
            raise DamagedError("it is a symbolic link") from error
        raise
    with opened as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise DamagedError("it is not a regular file")
        if sys.platform != "win32":
            if status.st_uid not in (0, os.geteuid()):
                raise DamagedError(f"it belongs to another user, of id {status.st_uid}")
            if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
                raise DamagedError("other users can write to it")
        yield file


def _seal(name: str, content: bytes) -> bytes:
    return hashlib.sha256(name.encode() + b"\0" + content).digest()


def _create(path: Path) -> IO[bytes]:
    return open(path, "xb", opener=lambda name, flags: os.open(name, flags, _FILE_MODE))


def _open_as_it_is(path: str, flags: int) -> int:
    """Open a file, but neither follow a link nor wait for the other end of a pipe."""
    if sys.platform == "win32":
        return os.open(path, flags)
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK)
