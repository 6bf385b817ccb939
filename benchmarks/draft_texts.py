"""The texts that scripts about drafts go on with; they share it, and it is no program of its own.

They are of this repository: no model has seen them.
"""

from pathlib import Path
from typing import Any

_ROOT = Path(__file__).parents[1]
TEXTS = {"code": "src/headinfer/**/*.py", "documents": "docs/*.md"}
"""The files of each text."""

_CHARACTERS = 8
"""Of a token, at the most: no more of a text is read for it."""


def text_of(name: str) -> str:
    """Return a text whole."""
    files = sorted(_ROOT.glob(TEXTS[name]))
    return "\n\n".join(file.read_text(encoding="utf-8") for file in files)


def first_tokens(tokenizer: Any, text: str, tokens: int) -> list[int]:
    """Return the first tokens of a text, which must have as many."""
    ids: list[int] = tokenizer(text[: _CHARACTERS * tokens])["input_ids"][:tokens]
    assert len(ids) == tokens
    return ids
