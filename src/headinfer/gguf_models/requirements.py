"""What reading GGUF files needs beside transformers, and the commands that install it."""

from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

from headinfer.errors import ModelLoadError

_READER = "gguf"
"""What transformers needs to read GGUF, for pip and in Python."""

_OLDEST_TRANSFORMERS = (5, 18)
"""The first that reads tokenizers right. 5.17 takes Gemma's for another kind, and the first token
of Llama's for the last one."""


def missing_command(requirement: str = "") -> str:
    """Return the command that installs what is missing.

    Args:
        requirement: of a model, with options of pip's; none where the model is there.
    """
    parts = (_READER if _lacks_reader() else "", requirement)
    return " && ".join(f"pip install {part}" for part in parts if part)


def check_reader(what: str) -> None:
    """Raise unless GGUF files can be read.

    Args:
        what: what asks for it, for the message.

    Raises:
        ModelLoadError: says how to install what is missing.
    """
    if _lacks_reader():
        raise ModelLoadError(f"{what} is GGUF, which needs {_READER}: {missing_command()}")
    found = transformers_version()
    if not found:  # it is as new as its user wants
        return
    oldest = ".".join(map(str, _OLDEST_TRANSFORMERS))
    if tuple(map(int, found.split(".")[:2])) < _OLDEST_TRANSFORMERS:
        raise ModelLoadError(
            f"{what} is GGUF, whose tokenizers transformers {found} reads wrongly: "
            f"pip install 'transformers>={oldest},<6'"
        )


def transformers_version() -> str:
    """Return the release of transformers that is installed; nothing for a source tree."""
    try:
        return version("transformers")
    except PackageNotFoundError:
        return ""


def _lacks_reader() -> bool:
    return find_spec(_READER) is None
