"""The folder of a session: who may use it now, and what in it belongs to a session."""

import contextlib
import os
import secrets
import shutil
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path

from headinfer.errors import SessionBusyError, SessionFileError, SessionRoomError
from headinfer.folders import describe
from headinfer.saved.index import INDEX_NAME, Index, is_page_name, parse_index
from headinfer.units import counted, format_bytes

if sys.platform != "win32":
    import fcntl

MESSAGES_NAME = "messages.json"
"""The file of a conversation's messages, beside the cache that has read them."""

_ELSEWHERE = "choose a place that you can write to"


def session_name(path: str | os.PathLike[str]) -> str:
    """Return a session's path as text, for messages.

    Raises:
        SessionFileError: it is no path.
    """
    if not isinstance(path, str | os.PathLike):
        raise SessionFileError(f"a session is a folder, given as a path, and not {path!r}")
    return os.fsdecode(os.fspath(path))


def read_index(path: str | os.PathLike[str]) -> Index:
    """Return what a session says of itself; its tokens are not read.

    Args:
        path: of the session.

    Raises:
        SessionFileError: there is no session, or it cannot be read.
    """
    name = session_name(path)
    if not os.path.isdir(name):
        found = "is a file" if os.path.isfile(name) else "is not there"
        raise SessionFileError(
            f"session {name!r} {found}; give a folder that --save-session or cache.save() wrote"
        )
    try:
        text = (Path(name) / INDEX_NAME).read_bytes()
    except FileNotFoundError:
        raise SessionFileError(
            f"{name!r} is not a session: there is no {INDEX_NAME} in it; give a folder that "
            "--save-session or cache.save() wrote to its end"
        ) from None
    except OSError as error:
        raise SessionFileError(f"session {name!r} cannot be read: {describe(error)}") from error
    return parse_index(text, name)


def check_saveable(path: str | os.PathLike[str]) -> None:
    """Refuse a place where no session can be saved; what is there stays as it is.

    Args:
        path: of a session that is there, or of one to be made.

    Raises:
        SessionFileError: there is something else, or nothing can be written there.
    """
    name = session_name(path)
    refusal = f"a session cannot be saved as {name!r}:"
    if not name or "\0" in name:
        raise SessionFileError(f"{refusal} that names no folder")
    try:
        parent = Path(os.path.realpath(name)).parent
        if not _is_there(name):
            if not parent.is_dir():
                raise SessionFileError(
                    f"{refusal} there is no folder {str(parent)!r}; make it first"
                )
            if not os.access(parent, os.W_OK):
                raise SessionFileError(
                    f"{refusal} folder {str(parent)!r} may not be written; {_ELSEWHERE}"
                )
            return
        if not os.path.isdir(name):
            raise SessionFileError(f"{refusal} there is a file of that name; choose another name")
        others = [each for each in os.listdir(name) if not _is_ours(each)]
    except OSError as error:
        raise SessionFileError(f"{refusal} {describe(error)}") from error
    if others:
        raise SessionFileError(
            f"{refusal} that folder has other things in it, such as {min(others)!r}; choose "
            "another name"
        )
    if not os.access(name, os.W_OK):
        raise SessionFileError(f"{refusal} that folder may not be written; {_ELSEWHERE}")


def try_place(path: str | os.PathLike[str]) -> None:
    """Refuse a place where nothing can be written, as the system alone knows it.

    A folder or a file is made and removed. Should that be cut off, what is left is in no
    session's way.

    Args:
        path: of a session that is there, or of one to be made.

    Raises:
        SessionFileError: it cannot be written there, or there is something else.
    """
    check_saveable(path)
    name = session_name(path)
    folder = Path(os.path.realpath(name))
    try:
        if folder.is_dir():
            trial = folder / f"{secrets.token_hex(4)}-000000.safetensors"
            trial.touch(exist_ok=False)
            trial.unlink()
        else:
            folder.mkdir(exist_ok=True)
            with contextlib.suppress(OSError):  # another process may just save there
                folder.rmdir()
    except OSError as error:
        raise SessionFileError(
            f"a session cannot be saved as {name!r}: {error.strerror or describe(error)}; "
            f"{_ELSEWHERE}"
        ) from error


def check_room(path: str | os.PathLike[str], num_bytes: int, tokens: int | None = None) -> None:
    """Refuse to save what the disk has no room for.

    Args:
        path: of a session, which stays until the new one is whole.
        num_bytes: that are to be written.
        tokens: that they hold, for the message; None to leave them out.

    Raises:
        SessionRoomError: there is too little room now.
        OSError: the system does not tell.
    """
    name = session_name(path)
    folder = Path(os.path.realpath(name))
    there = folder.is_dir()
    free = shutil.disk_usage(folder if there else folder.parent).free
    if num_bytes <= free:
        return
    beside = ", beside the one that is there" if there and os.listdir(folder) else ""
    of = "" if tokens is None else f" of {counted(tokens, 'token')}"
    raise SessionRoomError(
        f"the session{of} needs {format_bytes(num_bytes)} on disk{beside}, and "
        f"{format_bytes(free)} are free where {name!r} is; free some, or choose another place"
    )


def _is_there(name: str) -> bool:
    try:
        os.lstat(name)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def _is_ours(name: str) -> bool:
    known = (INDEX_NAME, MESSAGES_NAME)
    return name.removesuffix(".new") in known or is_page_name(name)


def messages_path(folder: Path, index: Index) -> Path:
    """Return where the messages lie that were saved with an index.

    A save that was cut off between its last two steps left them beside the older ones.
    """
    path, crc32 = folder / MESSAGES_NAME, index.messages_crc32
    new = folder / f"{MESSAGES_NAME}.new"
    return new if crc32 is not None and _crc32(path) != crc32 == _crc32(new) else path


def _crc32(path: Path) -> int | None:
    try:
        return zlib.crc32(path.read_bytes())
    except OSError:
        return None


def remove_unlisted(folder: Path, listed: set[str]) -> None:
    """Remove pages that no index names, as of a save that was cut off; what cannot be stays."""
    for name in os.listdir(folder):
        if is_page_name(name) and name not in listed:
            with contextlib.suppress(OSError):
                (folder / name).unlink()


@contextlib.contextmanager
def holding(folder: Path, *, alone: bool) -> Iterator[None]:
    """Keep others from saving to a session while it is read or saved.

    A lock ends with the process, however that ends. Where locks are not to be had there is none.

    Args:
        folder: of the session.
        alone: whether to keep others from reading it, too.

    Raises:
        SessionBusyError: it is being saved or read by somebody else.
    """
    if sys.platform == "win32":
        yield
        return
    lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(lock, (fcntl.LOCK_EX if alone else fcntl.LOCK_SH) | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SessionBusyError(
                f"session {str(folder)!r} is being saved or read by another process; try again "
                "when that is done"
            ) from None
        except OSError:  # as over some networks
            pass
        yield
    finally:
        os.close(lock)


def synchronize_folder(folder: Path) -> None:
    """Have the names in a folder survive a loss of power, where that can be asked for."""
    if sys.platform == "win32":
        return
    opened = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)
