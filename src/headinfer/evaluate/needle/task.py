"""A needle in a haystack: a fact that no model knows by heart, hidden in prose.

The fact lies at several depths of prompts of several lengths, as in Figure 6 of the paper.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from headinfer.evaluate.answers.record import Record
from headinfer.evaluate.needle.hiding import Hidden, Hiding
from headinfer.evaluate.prompts.haystack import PROSE_PACKAGE, Haystack, prose

_SYLLABLES = ("bar", "den", "fol", "gri", "har", "kes", "lom", "mir", "nov", "pel", "ros", "tav")
_NAME_SYLLABLES = 3
_DIGITS = 5

_MESSAGE = (
    "A special number is hidden in the text below. Find it and remember it.\n\n",
    "\n\nWhat is the special number of {name} that the text above mentions?",
)
_FACT = " The special number of {name} is {number}."
_BEGUN = "The special number of {name} is"


@dataclass(frozen=True, slots=True, kw_only=True)
class Needle(Hiding):
    """A task of hidden facts, each a name and a number drawn from the seed.

    Attributes:
        name: of the verb.
    """

    name: str = "needle"

    def haystack(self, tokenizer: Any, context_tokens: int) -> Haystack:
        """Return the prose."""
        return Haystack(prose(self.text), tokenizer)

    def hidden(self, drawn: random.Random, sample: int) -> Hidden:
        """Return a fact."""
        name, number = made_up_name(drawn), str(drawn.randrange(10 ** (_DIGITS - 1), 10**_DIGITS))
        before, after = (part.format(name=name) for part in _MESSAGE)
        return Hidden(
            sentence=_FACT.format(name=name, number=number),
            message=(before, after),
            begun=_BEGUN.format(name=name),
            answer=number,
        )

    def told(self) -> list[str]:
        """Return where the prose is from."""
        return [f"facts hidden in {self.text or PROSE_PACKAGE}"]

    def remarks(self, records: Sequence[Record]) -> list[str]:
        """Return nothing: the scores tell all."""
        return []


def made_up_name(drawn: random.Random) -> str:
    """Return a name that nobody has."""
    return "".join(drawn.choice(_SYLLABLES) for _ in range(_NAME_SYLLABLES)).capitalize()
