"""Folders of files that are made once and kept in the user's cache, such as models.

A folder is made beside its place and renamed. So it is never half full, also when several
processes make it at once.
"""

import functools
import logging
import os
from collections.abc import Callable
from pathlib import Path

from headinfer.checked_files import DamagedError, check_folder, seal_folder
from headinfer.errors import ModelLoadError
from headinfer.folders import describe, private_folder, temporary_folder
from headinfer.scratch import one_at_a_time, scratch_folder

_logger = logging.getLogger(__name__)


def kept_folder(name: str, make: Callable[[Path], None], *, what: str) -> Path:
    """Return a folder in the user's cache; make it if it is not there and whole.

    Where nothing can be kept it is made for this process.

    Args:
        name: of the folder. What determines its content is part of the name.
        make: makes the folder and fills it. The folder above it is for scratch.
        what: what the folder holds, for messages: "the demo model".

    Raises:
        ModelLoadError: it can be written nowhere.
    """
    try:
        return _ensure_in(private_folder(), name, make, what)
    except OSError as error:
        _say_not_kept(what, describe(error))
    try:
        return _ensure_in(temporary_folder(), name, make, what)
    except OSError as error:
        raise ModelLoadError(
            f"{what} cannot be built ({describe(error)}); make room, or set "
            "XDG_CACHE_HOME to a folder that only you can write to"
        ) from error


def _ensure_in(folder: Path, name: str, make: Callable[[Path], None], what: str) -> Path:
    target = folder / name
    damage = _damage(target)
    if damage is None:
        return target
    if os.path.lexists(target):
        _logger.warning("%s in %s is damaged (%s): it is built anew", what, target, damage)
    with scratch_folder(folder) as scratch:
        built = scratch / "model"
        _make_sealed(built, make)
        with one_at_a_time(folder):
            # A whole one is another process's, which was first and may be read already.
            if _damage(target) is not None:
                if os.path.lexists(target):
                    target.rename(scratch / "damaged")
                built.rename(target)
    return target


def _damage(folder: Path) -> str | None:
    """Return what is wrong with a folder; None when it is whole."""
    try:
        check_folder(folder)
    except OSError as error:
        return describe(error)
    except DamagedError as error:
        return str(error)
    return None


def _make_sealed(folder: Path, make: Callable[[Path], None]) -> None:
    from safetensors import SafetensorError

    try:
        make(folder)
    except SafetensorError as error:  # on a full disk, say
        raise OSError(str(error)) from error
    seal_folder(folder)


@functools.cache
def _say_not_kept(what: str, reason: str) -> None:
    """Say so once in a process."""
    _logger.warning("%s cannot be kept (%s): it is built anew by each process", what, reason)
