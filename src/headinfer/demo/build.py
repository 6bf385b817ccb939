"""Build the demo model into a folder, and keep one built model in the user's cache."""

import hashlib
from importlib.resources import files
from pathlib import Path

from headinfer.kept import kept_folder

_SOURCES = (
    "codes.py",
    "heads.py",
    "layout.py",
    "prose.py",
    "tokenizer.py",
    "weights.py",
    "words.py",
)


def build_model(folder: Path, *, ungrouped: bool = False) -> None:
    """Write the demo model and its tokenizer to a folder, in the format of `save_pretrained`.

    Args:
        folder: Made if it does not exist; files of the same names in it are overwritten.
        ungrouped: Give each query head a KV head of its own; the model computes the same.
    """
    from headinfer.demo.tokenizer import build_tokenizer
    from headinfer.demo.ungrouped import ungroup
    from headinfer.demo.weights import construct_model

    tokenizer = build_tokenizer()
    model = construct_model(tokenizer)
    if ungrouped:
        model = ungroup(model)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def ensure_model() -> Path:
    """Return the demo model's folder in the user's cache; build it if it is not there and whole.

    The folder's name holds a digest of the sources that determine the model, so a new version is
    built anew. Where nothing can be kept it is built for this process.

    Raises:
        ModelLoadError: it can be written nowhere.
    """
    return kept_folder(
        f"demo-{_digest()}", lambda folder: build_model(folder), what="the demo model"
    )


def _digest() -> str:
    package = files(__package__ or "headinfer.demo")
    digest = hashlib.sha256()
    for name in _SOURCES:
        digest.update(package.joinpath(name).read_bytes())
    return digest.hexdigest()[:12]
