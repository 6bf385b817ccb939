"""Build the demo model into a folder, and keep one built model in the user's cache."""

import hashlib
import tempfile
from importlib.resources import files
from pathlib import Path

from headinfer.folders import cache_folder

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
    """Return the demo model's folder in the user's cache; build it if it is not there.

    The folder's name holds a digest of the sources that determine the model, so a new version is
    built anew. The model is built beside it and renamed, so the folder is never half full, also
    when several processes do this at once.
    """
    target = cache_folder() / f"demo-{_digest()}"
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".demo-") as scratch:
        built = Path(scratch) / "model"
        build_model(built)
        try:
            built.rename(target)
        except OSError:
            # Another process was first: its folder is complete and the same, so ours can go.
            if not target.is_dir():
                raise
    return target


def _digest() -> str:
    package = files(__package__ or "headinfer.demo")
    digest = hashlib.sha256()
    for name in _SOURCES:
        digest.update(package.joinpath(name).read_bytes())
    return digest.hexdigest()[:12]
