"""Folders for what is in the making, and removing those that killed processes left behind.

Whoever makes such a folder holds a lock on it, which ends with the process however that ends. So a
folder whose lock can be had is left over, also where several machines or containers share it.
"""

import contextlib
import os
import shutil
import stat
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

if sys.platform != "win32":
    import fcntl

_PREFIX = "headinfer-scratch-"
_OLD_S = 24 * 60 * 60
"""Age from which a folder is left over where locks are not to be had."""

_PATIENCE_S = 10


@contextlib.contextmanager
def scratch_folder(parent: Path) -> Iterator[Path]:
    """Make a folder that nobody else may use, and remove it with all that is still in it.

    Args:
        parent: where it is made; the folder can be renamed to a name beside it.

    Raises:
        OSError: nothing can be written there.
    """
    folder, lock = make_scratch(parent)
    try:
        yield folder
    finally:
        remove_scratch(folder, lock)


def make_scratch(parent: Path) -> tuple[Path, int | None]:
    """Return a new folder, of this user alone, and the lock on it; see `scratch_folder`."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent))
        if sys.platform == "win32":
            return folder, None
        try:
            lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError:  # another process took it for left over
            continue
        # Shared, for over NFS a file must be open for writing to be locked exclusively.
        with contextlib.suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_SH)
        if folder.is_dir():
            return folder, lock
        os.close(lock)


def remove_scratch(folder: Path, lock: int | None) -> None:
    """Remove what `make_scratch` made, with all that is in it."""
    shutil.rmtree(folder, ignore_errors=True)
    if lock is not None:
        os.close(lock)


def remove_leftovers(parent: Path) -> None:
    """Remove what killed processes left in the making; what cannot be removed stays.

    Args:
        parent: folder of the `scratch_folder`s.
    """
    try:
        names = os.listdir(parent)
    except OSError:
        return
    for name in names:
        if name.startswith(_PREFIX):
            with contextlib.suppress(OSError):
                _remove_if_left(parent / name)


@contextlib.contextmanager
def one_at_a_time(folder: Path) -> Iterator[None]:
    """Keep other processes from the same block for a folder, as far as locks are to be had.

    One that holds it for ten seconds, having been stopped say, is waited for no longer.
    """
    if sys.platform == "win32":
        yield
        return
    lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        deadline_s = time.monotonic() + _PATIENCE_S
        while not _can_lock(lock, otherwise=True) and time.monotonic() < deadline_s:
            time.sleep(0.02)
        yield
    finally:
        os.close(lock)


def _remove_if_left(folder: Path) -> None:
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode):
        return
    age_s = time.time() - status.st_mtime
    if sys.platform == "win32":
        if age_s > _OLD_S:
            shutil.rmtree(folder, ignore_errors=True)
        return
    if status.st_uid != os.geteuid():
        return
    lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        if _can_lock(lock, otherwise=age_s > _OLD_S):
            shutil.rmtree(folder, ignore_errors=True)
    finally:
        os.close(lock)


def _can_lock(lock: int, *, otherwise: bool) -> bool:
    """Lock a folder if nobody holds it; `otherwise` is returned where locks are not to be had."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return otherwise
    return True
