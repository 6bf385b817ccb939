"""Where unpacked GGUF models are kept: in the user's cache, each in a folder of its own."""

import functools
import hashlib
import logging
import os
import re
from importlib.resources import files
from pathlib import Path

from headinfer.folders import FolderError, cache_folder
from headinfer.gguf_models.packaged import PACKAGED, PackagedModel
from headinfer.gguf_models.requirements import transformers_version
from headinfer.gguf_models.unpack import unpack
from headinfer.kept import kept_folder
from headinfer.units import format_bytes

_logger = logging.getLogger(__name__)

UNPACKED_DTYPE = "float32"
"""That weights are unpacked to unless another is asked for; it holds them exactly."""

_DTYPES = ("bfloat16", "float16")
_SUFFIX = ".gguf"
_MAX_STEM = 60


def is_gguf_model(name: str) -> bool:
    """Whether a user's name of a model is one of `PACKAGED`, or a GGUF file that is there."""
    return name in PACKAGED or gguf_file(name) is not None


def gguf_file(name: str) -> Path | None:
    """Return the GGUF file that a user names by its path; None for all other names."""
    file = Path(os.path.expanduser(name))
    return file if file.suffix.lower() == _SUFFIX and os.path.isfile(file) else None


def unpacked_dtype(dtype: str) -> str:
    """Return the dtype to unpack to, where a model is to be loaded in one; "auto" for any."""
    return dtype if dtype in _DTYPES else UNPACKED_DTYPE


def model_folder(name: str, dtype: str = UNPACKED_DTYPE) -> Path:
    """Return the folder of a model in GGUF; unpack it if it is not there and whole.

    Once a process has looked at a folder, it does not look again: that takes seconds.

    Args:
        name: for which `is_gguf_model`.
        dtype: of its weights, from `unpacked_dtype`.

    Raises:
        ModelLoadError: it is not installed, cannot be read, or can be written nowhere.
    """
    try:
        cache = str(cache_folder())
    except FolderError:
        cache = ""
    file = gguf_file(name)
    if name in PACKAGED or file is None:
        return _packaged_folder(PACKAGED[name], dtype, cache)
    status = file.stat()
    state = f"{file.resolve()} {status.st_size} {status.st_mtime_ns}"
    return _file_folder(file.resolve(), name, state, dtype, cache)


def check_packaged(name: str, dtype: str = UNPACKED_DTYPE) -> None:
    """Refuse a packaged model that is neither installed nor unpacked already, at once.

    Args:
        name: for which `is_gguf_model`; a file's is not refused.
        dtype: as for `model_folder`.

    Raises:
        ModelLoadError: it is neither; says how to install it.
    """
    if name not in PACKAGED:
        return
    try:
        if (cache_folder() / _packaged_name(PACKAGED[name], dtype)).is_dir():
            return
    except FolderError:
        pass
    PACKAGED[name].files()


def _packaged_name(model: PackagedModel, dtype: str) -> str:
    return f"{model.name}-{_digest(model.sha256, dtype)}"


@functools.cache
def _packaged_folder(model: PackagedModel, dtype: str, _cache: str) -> Path:
    def make(folder: Path) -> None:
        parts = model.files()
        whole = model.join(parts, folder.with_name(f"{model.name}{_SUFFIX}"))
        unpack(whole, folder, model.name, dtype)
        _say_kept(model.title, folder, dtype, model.terms)

    return kept_folder(_packaged_name(model, dtype), make, what=f"model {model.name!r}")


@functools.cache
def _file_folder(file: Path, given: str, state: str, dtype: str, _cache: str) -> Path:
    """Return the folder of a file; what determines the file's content is in its `state`."""

    def make(folder: Path) -> None:
        unpack(file, folder, given, dtype)
        _say_kept(file.name, folder, dtype, None)

    stem = re.sub(r"[^\w.-]", "_", file.stem)[:_MAX_STEM]
    return kept_folder(f"{stem}-{_digest(state, dtype)}", make, what=f"model {given!r}")


def _say_kept(title: str, folder: Path, dtype: str, terms: str | None) -> None:
    num_bytes = sum(path.stat().st_size for path in folder.iterdir())
    place = folder.parent.parent
    under = f"; it comes under {terms}" if terms else ""
    size = format_bytes(num_bytes)
    _logger.warning("%s is unpacked once, to %s: %s in %s%s", title, dtype, size, place, under)


def _digest(content: str, dtype: str) -> str:
    """Return a digest of what determines a folder: the model's file, and what unpacks it how."""
    code = files(__package__ or "headinfer.gguf_models").joinpath("unpack.py").read_bytes()
    reader = f"{content} {dtype} {transformers_version()} "
    return hashlib.sha256(reader.encode() + code).hexdigest()[:12]
