"""Loading a checkpoint so that all weights of the model come from it.

transformers makes up weights that a checkpoint lacks, or holds in another shape, from random
numbers, and tells only its log.
"""

import json
import re
import zipfile
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import (
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
    cached_file,
)

from headinfer.errors import ModelLoadError

_LOADED = (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_NAME, WEIGHTS_INDEX_NAME)
"""Files of weights, and lists of them: transformers loads the first that is there."""

_LFS = b"version htt"
"""What a pointer of Git LFS begins with."""

_NAMED = 3
"""How many weights a message names."""


def load_checkpoint(
    name: str, location: str, **keywords: Any
) -> tuple[PreTrainedModel, str | None]:
    """Return a causal language model whose weights are all its checkpoint's.

    Weights that the model declares to be tied to others, or to be none of a checkpoint's, may lack.

    Args:
        name: of the model, for messages.
        location: a folder or hub id.
        keywords: for `from_pretrained`.

    Returns:
        The model, and a note about weights of the checkpoint that it has no use for, if any.

    Raises:
        ModelLoadError: weights are missing or of another shape, or a file is missing or damaged.
        Exception: whatever else transformers raises.
    """
    settings = {"output_loading_info": True, "ignore_mismatched_sizes": True}
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(location, **keywords, **settings)
    except (MemoryError, torch.OutOfMemoryError):
        raise  # whatever else may be wrong, this is why
    except Exception as error:
        fault = None if "gguf_file" in keywords else _fault_in(location)
        if "above report" in str(error):  # which went to transformers' log
            fault = "its weights cannot be converted to those of transformers' class"
        if fault is None:
            raise
        raise ModelLoadError(f"model {name!r} cannot be loaded: {fault}") from error
    model, report = loaded
    _check_complete(name, report["missing_keys"], report["mismatched_keys"])
    unused = report["unexpected_keys"]
    if not unused:
        return model, None
    return model, f"the model has no use for {_listed(unused)} of its checkpoint"


def _check_complete(
    name: str, missing: Collection[str], mismatched: Collection[tuple[str, Any, Any]]
) -> None:
    """Raise if a weight of the model would be random."""
    remedy = "fetch the checkpoint again, or correct config.json, which must be of this checkpoint"
    if missing:
        raise ModelLoadError(
            f"model {name!r}: its checkpoint lacks {_listed(missing)}, which would be random; "
            f"{remedy}"
        )
    if mismatched:
        weight, stored, wanted = min(mismatched, key=lambda found: _natural(found[0]))
        raise ModelLoadError(
            f"model {name!r}: {_listed([found[0] for found in mismatched])} would be random, for "
            f"the checkpoint has other shapes: {weight} is {list(stored)} and not {list(wanted)}; "
            f"{remedy}"
        )


def _listed(weights: Collection[str]) -> str:
    """Return how many weights there are, and the first few."""
    first = sorted(weights, key=_natural)[:_NAMED]
    dots = ", ..." if len(weights) > _NAMED else ""
    return f"{len(weights)} weight{'s' * (len(weights) > 1)} ({', '.join(first)}{dots})"


def _natural(name: str) -> list[tuple[int, str]]:
    """Return what sorts layer 10 behind layer 9."""
    return [
        (int(part), "") if part.isdigit() else (-1, part)
        for part in re.split(r"(\d+)", name)
        if part
    ]


def _fault_in(location: str) -> str | None:
    """Return what is wrong with the files of a checkpoint that did not load; None if nothing is.

    transformers' own messages name no file. Files that it does not load may be missing or damaged.
    """
    folder = Path(location)
    if not folder.is_dir():
        config = None
        with suppress(Exception):  # no such model: then there are no files to look at
            config = cached_file(location, "config.json", local_files_only=True)
        if config is None:
            return None
        folder = Path(config).parent
    loaded = next((folder / name for name in _LOADED if (folder / name).is_file()), None)
    if loaded is None:
        if any(folder.glob("*.gguf")):
            return "its weights are GGUF; give that file itself, or safetensors files"
        return None
    if loaded.suffix == ".json":
        return _fault_in_shards(loaded)
    return _damaged(loaded) if _is_damaged(loaded) else None


def _fault_in_shards(index: Path) -> str | None:
    """Return what is wrong with the list of a checkpoint's files, or with one of them."""
    try:
        names = set(json.loads(index.read_bytes())["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return _damaged(index)
    missing = sorted(name for name in names if not (index.parent / name).is_file())
    if missing:
        return f"{missing[0]} is missing, which {index.name} names; fetch it again"
    shards = (index.parent / name for name in sorted(names))
    return next((_damaged(shard) for shard in shards if _is_damaged(shard)), None)


def _is_damaged(file: Path) -> bool:
    """Whether a file of weights is not what its name says; reads its header alone."""
    if file.suffix == ".bin":
        with file.open("rb") as opened:
            start = opened.read(len(_LFS))
        return start in (b"", _LFS) or (start[:2] == b"PK" and not zipfile.is_zipfile(file))
    try:
        with safe_open(file, framework="pt"):
            return False
    except Exception:
        # safetensors has errors of its own, and passes on those of the system.
        return True


def _damaged(file: Path) -> str:
    with suppress(OSError), file.open("rb") as opened:
        if opened.read(len(_LFS)) == _LFS:
            return f"{file.name} is a pointer of Git LFS; `git lfs pull` fetches the weights"
    return f"{file.name} is damaged or cut short; fetch it again"
