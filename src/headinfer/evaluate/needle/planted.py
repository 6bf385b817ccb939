"""Prose with passkeys planted in it, all of which are asked for at its end.

Heads of a model are found with such texts. The words are others than those of the needle task, so
that a pattern is not judged by what it was made from.
"""

import random
from typing import Any

from headinfer.errors import OptionError
from headinfer.evaluate.needle.task import made_up_name
from headinfer.evaluate.prompts.haystack import Haystack, frame
from headinfer.finding.texts import Copied, Example
from headinfer.units import counted

_MESSAGE = (
    "Somewhere in the following text there are passkeys. Keep them in mind.\n\n",
    "\n\nList the passkeys that the text mentions.",
)
_BEGUN = "These are the passkeys."
_AGAIN = "\n\nThe same text once more, word for word:\n\n"
_DIGITS = 6
_TOKENS_PER_PASSKEY = 150
_MOST_PASSKEYS = 10


class PlantedTexts:
    """A supply of prose, plain or with passkeys.

    Args:
        haystack: the prose.
        tokenizer: that it was read with.
        name: of the prose.
        raw: whether the model's chat template is left out.
    """

    def __init__(self, haystack: Haystack, tokenizer: Any, name: str, *, raw: bool) -> None:
        self._haystack = haystack
        self._tokenizer = tokenizer
        self._raw = raw
        self.name = name
        self.again = self._tokens(_AGAIN)

    def text(self, tokens: int, seed: str) -> list[int]:
        """Return prose from a place that is drawn."""
        drawn = random.Random(seed)
        begin = list(self._tokenizer("")["input_ids"])
        first = drawn.randrange(len(self._haystack))
        sentences = self._haystack.sentences(first, tokens - len(begin))
        return [*begin, *(token for sentence in sentences for token in sentence)]

    def example(self, tokens: int, seed: str) -> Example:
        """Return prose with passkeys at places that are drawn, and the answer that lists them.

        Raises:
            OptionError: the tokens are too few for one passkey and its question.
        """
        drawn = random.Random(seed)
        count = max(1, min(_MOST_PASSKEYS, tokens // _TOKENS_PER_PASSKEY))
        facts = [self._fact(drawn) for _ in range(count)]
        around = frame(self._tokenizer, _MESSAGE, _BEGUN, raw=self._raw)
        room = tokens - around.tokens - 2 * sum(len(said) + len(key) for said, key in facts)
        if room < 0:
            whose = "its" if count == 1 else "their"
            raise OptionError(
                f"a text of {counted(tokens, 'token')} is too short for "
                f"{counted(count, 'passkey')} and {whose} question; give at least {tokens - room} "
                "with --tokens"
            )
        sentences = self._haystack.sentences(drawn.randrange(len(self._haystack)), room)
        places = sorted(drawn.randrange(len(sentences) + 1) for _ in facts)
        ids, sources = list(around.before), []
        for number in range(len(sentences) + 1):
            for place, (said, key) in zip(places, facts, strict=True):
                if place == number:
                    ids += said
                    sources.append(len(ids))
                    ids += key
            if number < len(sentences):
                ids += sentences[number]
        ids += around.after
        copied = []
        for source, (said, key) in zip(sources, facts, strict=True):
            ids += said
            copied += [
                Copied(at=len(ids) + digit, sources=(source + digit,))
                for digit in range(len(key) - 1)  # the last ends the sentence
            ]
            ids += key
        return Example(ids=tuple(ids), copied=tuple(copied))

    def _fact(self, drawn: random.Random) -> tuple[list[int], list[int]]:
        """Return a passkey: what says whose it is, and the key itself with a full stop."""
        said = self._tokens(f" The passkey of {made_up_name(drawn)} is")
        number = drawn.randrange(10 ** (_DIGITS - 1), 10**_DIGITS)
        return said, [*self._tokens(f" {number}"), *self._tokens(".")]

    def _tokens(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])
