"""How many tokens a text has at least, by its bytes alone: long ones take minutes to tokenise."""

import functools
import itertools
import json
import unicodedata
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

_SHORT_CHARS = 2**20
"""Characters of a text that is tokenised within some seconds."""

_KEEPING = ("ByteLevel", "Digits", "Metaspace", "Punctuation", "Split")
"""Kinds of cutting a text into words, which keep all of it unless they are told to remove some."""


class LeastTokens:
    """A lower bound of the tokens of texts, for tokenizers that keep every byte.

    Others may leave out spaces, or write a word that they do not know as one token. A text has any
    number of tokens then, as far as is known here.

    Args:
        tokenizer: of transformers.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def of(self, text: str) -> int:
        """Return a number of tokens that a text has in any case; 0 for a short one."""
        if len(text) <= _SHORT_CHARS or (known := self._known) is None:
            return 0
        kept = unicodedata.normalize("NFC", text).encode().translate(None, known.left_out)
        return -(-len(kept) // known.longest_bytes)

    @functools.cached_property
    def _known(self) -> "_Tokens | None":
        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        return None if backend is None else _tokens_of(json.loads(backend.to_str()))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Tokens:
    """A vocabulary.

    Attributes:
        longest_bytes: of text that one token stands for, at the most.
        left_out: bytes that have no token of their own.
    """

    longest_bytes: int
    left_out: bytes


def _tokens_of(parts: Mapping[str, Any]) -> _Tokens | None:
    """Return what is known of a tokenizer, given as its file has it.

    Returns:
        None where a token may stand for any number of bytes.
    """
    model, added = parts["model"], parts["added_tokens"]
    cutting = list(_steps(parts["pre_tokenizer"], "pretokenizers"))
    if (
        model["type"] != "BPE"
        or any(token["lstrip"] or token["rstrip"] for token in added)  # which swallow spaces
        or not all(map(_keeps, _steps(parts["normalizer"], "normalizers")))
        or any(step["type"] not in _KEEPING for step in cutting)
        or any(step.get("behavior") == "Removed" for step in cutting)
    ):
        return None
    vocabulary = model["vocab"]
    longest = max(len(token["content"].encode()) for token in [*added, {"content": ""}])
    if any(step["type"] == "ByteLevel" for step in cutting):
        left_out = [byte for byte, shown in enumerate(_shown_bytes()) if shown not in vocabulary]
        return _Tokens(longest_bytes=max(longest, *map(len, vocabulary)), left_out=bytes(left_out))
    if not model.get("byte_fallback") or any(f"<0x{n:02X}>" not in vocabulary for n in range(256)):
        return None
    longest = max(longest, *(len(token.encode()) for token in vocabulary))
    return _Tokens(longest_bytes=longest, left_out=b"")


def _shown_bytes() -> list[str]:
    """Return the characters that byte-level tokens have for bytes, as GPT-2 chose them."""
    plain = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = itertools.count(0x100)
    return [chr(byte if byte in plain else next(others)) for byte in range(0x100)]


def _keeps(step: Mapping[str, Any]) -> bool:
    """Whether a step before cutting makes no text shorter, but for composing its characters."""
    if step["type"] == "Replace":
        old = step["pattern"].get("String")
        return old is not None and len(step["content"].encode()) >= len(old.encode()) > 0
    return step["type"] in ("NFC", "Prepend")


def _steps(step: Mapping[str, Any] | None, name: str) -> Iterator[Mapping[str, Any]]:
    """Yield the steps of a part of a tokenizer, in their order."""
    if step is None:
        return
    if step["type"] == "Sequence":
        for each in step[name]:
            yield from _steps(each, name)
    else:
        yield step
