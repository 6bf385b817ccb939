"""Build the demo model into a folder, and keep one built model in the user's cache."""

import functools
import hashlib
import logging
import os
from importlib.resources import files
from pathlib import Path

from headinfer.checked_files import DamagedError, check_folder, seal_folder
from headinfer.errors import ModelLoadError
from headinfer.folders import describe, private_folder, temporary_folder
from headinfer.scratch import one_at_a_time, scratch_folder

_logger = logging.getLogger(__name__)

_SOURCES = (
    "codes.py",
    "heads.py",
    "layout.py",
    "prose.py",
    "tokenizer.py",
    "weights.py",
    "words.py",
)


def build_model(folder: Path) -> None:
    """Write the demo model and its tokenizer to a folder, in the format of `save_pretrained`.

    Args:
        folder: Made if it does not exist; files of the same names in it are overwritten.
    """
    from headinfer.demo.tokenizer import build_tokenizer
    from headinfer.demo.weights import construct_model

    tokenizer = build_tokenizer()
    construct_model(tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def ensure_model() -> Path:
    """Return the demo model's folder in the user's cache; build it if it is not there and whole.

    The folder's name holds a digest of the sources that determine the model, so a new version is
    built anew. The model is built beside it and renamed, so the folder is never half full, also
    when several processes do this at once. Where nothing can be kept it is built for this process.

    Raises:
        ModelLoadError: it can be written nowhere.
    """
    name = f"demo-{_digest()}"
    try:
        return _ensure_in(private_folder(), name)
    except OSError as error:
        _say_not_kept(describe(error))
    try:
        return _ensure_in(temporary_folder(), name)
    except OSError as error:
        raise ModelLoadError(
            f"the demo model cannot be built ({describe(error)}); make room, or set "
            "XDG_CACHE_HOME to a folder that only you can write to"
        ) from error


def _ensure_in(folder: Path, name: str) -> Path:
    target = folder / name
    damage = _damage(target)
    if damage is None:
        return target
    if os.path.lexists(target):
        _logger.warning("the demo model in %s is damaged (%s): it is built anew", target, damage)
    with scratch_folder(folder) as scratch:
        built = scratch / "model"
        _build_sealed(built)
        with one_at_a_time(folder):
            # A whole one is another process's, which was first and may be read already.
            if _damage(target) is not None:
                if os.path.lexists(target):
                    target.rename(scratch / "damaged")
                built.rename(target)
    return target


def _damage(folder: Path) -> str | None:
    """Return what is wrong with a built model; None when it is whole."""
    try:
        check_folder(folder)
    except OSError as error:
        return describe(error)
    except DamagedError as error:
        return str(error)
    return None


def _build_sealed(folder: Path) -> None:
    from safetensors import SafetensorError

    try:
        build_model(folder)
    except SafetensorError as error:  # on a full disk, say
        raise OSError(str(error)) from error
    seal_folder(folder)


@functools.cache
def _say_not_kept(reason: str) -> None:
    """Say so once in a process."""
    _logger.warning("the demo model cannot be kept (%s): it is built anew by each process", reason)


def _digest() -> str:
    package = files(__package__ or "headinfer.demo")
    digest = hashlib.sha256()
    for name in _SOURCES:
        digest.update(package.joinpath(name).read_bytes())
    return digest.hexdigest()[:12]
