"""Where HeadInfer keeps what it builds on a user's machine: folders that nobody else can change.

What is kept is loaded as code. So a folder is used only if it, and every folder above it, belongs
to this user or to root. Nobody else may be able to replace what lies in it.
"""

import errno
import functools
import logging
import os
import stat
import sys
import tempfile
from multiprocessing.util import Finalize
from pathlib import Path

from headinfer.scratch import make_scratch, remove_leftovers, remove_scratch

if sys.platform != "win32":
    import grp
    import pwd

_logger = logging.getLogger(__name__)

PRIVATE_MODE = 0o700
_WRITABLE_BY_OTHERS = stat.S_IWGRP | stat.S_IWOTH


class FolderError(OSError):
    """A folder in which nothing can be kept safely, or no folder to keep anything in."""

    def __init__(self, reason: str, path: Path | None = None) -> None:
        super().__init__(errno.EPERM, reason, *(() if path is None else (str(path),)))


def cache_folder() -> Path:
    """Return `$XDG_CACHE_HOME/headinfer` or `~/.cache/headinfer`, which may not exist.

    A relative `XDG_CACHE_HOME` is ignored, as its specification demands, and so is such a `HOME`.

    Raises:
        FolderError: the user has no home folder.
    """
    return _configured("XDG_CACHE_HOME", ".cache")


def private_folder(*parts: str) -> Path:
    """Return a folder in the cache folder that nobody else can change, made if it is missing.

    Once in a process, what killed runs left in it is removed. It may be read-only.

    Args:
        parts: names of folders, from the cache folder downwards.

    Raises:
        OSError: it cannot be made, or others could change what is in it.
    """
    folder = _made_private(cache_folder(), *parts)
    _clear(folder)
    return folder


def state_folder() -> Path:
    """Return the folder for what outlives a run, which nobody else can change; made if missing.

    It is `$XDG_STATE_HOME/headinfer` or `~/.local/state/headinfer`.

    Raises:
        OSError: it cannot be made, or others could change what is in it.
    """
    return _made_private(_configured("XDG_STATE_HOME", ".local", "state"))


def temporary_folder() -> Path:
    """Return a folder of this process alone, which is removed when it ends.

    Raises:
        OSError: there is no folder for temporary files, or others could change what is in it.
    """
    return _temporary_folder(os.getpid())


def describe(error: OSError) -> str:
    """Return what an error of the system's says, with the path it is about, on one line."""
    reason = error.strerror or str(error) or type(error).__name__
    return f"{os.fsdecode(error.filename)}: {reason}" if error.filename else reason


def _configured(variable: str, *otherwise: str) -> Path:
    """Return our folder below the one that a variable names, or else below one at home."""
    configured = os.environ.get(variable, "")
    base = Path(configured) if os.path.isabs(configured) else _home().joinpath(*otherwise)
    return base / "headinfer"


def _made_private(ours: Path, *parts: str) -> Path:
    """Return a folder in one of ours, once it and all above it are closed to others."""
    root = Path(os.path.realpath(ours))
    folder = root.joinpath(*parts)
    for above in reversed(folder.parents):
        _make_private(above, ours=above.is_relative_to(root))
    _make_private(folder, ours=True)
    return folder


def _home() -> Path:
    """Return the user's home folder: `HOME`, and where that is none, the one in the passwd file."""
    if sys.platform == "win32":
        return Path.home()
    home = os.environ.get("HOME", "")
    if not os.path.isabs(home):
        try:
            home = pwd.getpwuid(os.getuid()).pw_dir
        except KeyError:
            home = ""
    if not os.path.isabs(home):
        raise FolderError("this user has no home folder; set HOME or XDG_CACHE_HOME")
    return Path(home)


@functools.cache
def _clear(folder: Path) -> None:
    remove_leftovers(folder)


@functools.cache
def _temporary_folder(pid: int) -> Path:
    """Return the folder of one process; a forked one has its own, for its parent may end first."""
    parent = Path(os.path.realpath(tempfile.gettempdir()))
    for above in (*reversed(parent.parents), parent):
        _check(above, above.lstat())
    remove_leftovers(parent)
    scratch, lock = make_scratch(parent)
    # Unlike atexit, this runs at the end of processes that multiprocessing forked, and not at that
    # of others, which are forked from this one and know the folder.
    Finalize(None, remove_scratch, (scratch, lock), exitpriority=0)
    folder = scratch / "headinfer"  # for the scratch folder is locked
    folder.mkdir(mode=PRIVATE_MODE)
    return folder


def _make_private(folder: Path, *, ours: bool) -> None:
    """Make a folder if it is missing, and refuse one in which others can change or replace things.

    Args:
        folder: whose parent has passed.
        ours: whether it lies in the cache folder; it is then closed to others if need be.
    """
    try:
        status = folder.lstat()
    except FileNotFoundError:
        folder.mkdir(mode=PRIVATE_MODE, exist_ok=True)
        status = folder.lstat()
    if ours and sys.platform != "win32" and status.st_uid == os.geteuid():
        if stat.S_ISDIR(status.st_mode) and status.st_mode & _WRITABLE_BY_OTHERS:
            folder.chmod(PRIVATE_MODE)
            _logger.warning("%s could be written to by other users: it is now closed", folder)
            return
    _check(folder, status)


def _check(folder: Path, status: os.stat_result) -> None:
    if not stat.S_ISDIR(status.st_mode):
        raise FolderError("is not a folder", folder)
    if sys.platform == "win32":
        return
    if status.st_uid not in (0, os.geteuid()):
        raise FolderError(f"belongs to another user, of id {status.st_uid}", folder)
    if not status.st_mode & _WRITABLE_BY_OTHERS or status.st_mode & stat.S_ISVTX:
        return  # in a sticky folder nobody can rename what is another's
    if status.st_mode & stat.S_IWOTH or not _is_private_group(status.st_gid):
        raise FolderError("can be written to by other users", folder)


def _is_private_group(gid: int) -> bool:
    """Whether a group is the user's own, of nobody else: the default group on many systems."""
    if sys.platform == "win32":
        return False
    try:
        user, group = pwd.getpwuid(os.geteuid()), grp.getgrgid(gid)
    except KeyError:
        return False
    mine = gid == user.pw_gid and group.gr_name == user.pw_name
    return mine and set(group.gr_mem) <= {user.pw_name}
