"""Sentences that are off the theme of any old text, with the questions that they answer."""

import random
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class OffTheme:
    """A sentence of today, whose last words are drawn, so that no model can know them.

    Attributes:
        begun: the sentence up to these words; the answer begins so, too.
        question: that they answer.
        ends: what is drawn from.
    """

    begun: str
    question: str
    ends: tuple[str, ...]

    def drawn_end(self, drawn: random.Random) -> str:
        """Return words that end the sentence."""
        return drawn.choice(self.ends)


_FOODS = (
    *("pickled walnuts", "smoked beetroot", "candied ginger", "roasted chestnuts"),
    *("pumpkin pancakes", "rhubarb marmalade", "liquorice toffee", "buckwheat noodles"),
)
_NAMES = ("Ottoline Pfeiffer", "Wendell Okafor", "Ingrid Castellano", "Bartholomew Quist")
_TOWNS = ("Reykjavik", "Montevideo", "Singapore", "Winnipeg", "Ljubljana", "Casablanca")

# Those of twelve tried ones that stock SmolLM2-135M found in 2K tokens, at one of two depths.
SENTENCES: Sequence[OffTheme] = (
    OffTheme(
        begun="The vending machine on platform nine sells nothing but",
        question="What does the vending machine on platform nine sell?",
        ends=_FOODS,
    ),
    OffTheme(
        begun="The chess club meets every Tuesday in",
        question="Where does the chess club meet every Tuesday?",
        ends=_TOWNS,
    ),
    OffTheme(
        begun="The chairman's parrot eats nothing but",
        question="What does the chairman's parrot eat?",
        ends=_FOODS,
    ),
    OffTheme(
        begun="The goalkeeper of the football club is called",
        question="What is the goalkeeper of the football club called?",
        ends=_NAMES,
    ),
    OffTheme(
        begun="The headquarters of the bicycle company are in",
        question="Where are the headquarters of the bicycle company?",
        ends=_TOWNS,
    ),
    OffTheme(
        begun="The new airport terminal was designed by",
        question="Who designed the new airport terminal?",
        ends=_NAMES,
    ),
    OffTheme(
        begun="The night train from platform nine goes to",
        question="Where does the night train from platform nine go?",
        ends=_TOWNS,
    ),
)
