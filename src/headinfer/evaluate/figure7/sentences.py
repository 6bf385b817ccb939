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
_WORDS = (
    *("tangerine", "accordion", "butterscotch", "harmonica"),
    *("pelican", "trampoline", "cinnamon", "saxophone"),
)
_TOWNS = ("Reykjavik", "Montevideo", "Singapore", "Winnipeg", "Ljubljana", "Casablanca")

SENTENCES: Sequence[OffTheme] = (
    OffTheme(
        begun="The best sandwich in San Francisco is made with",
        question="What is the best sandwich in San Francisco made with?",
        ends=_FOODS,
    ),
    OffTheme(
        begun="The password of the airport's wireless network is",
        question="What is the password of the airport's wireless network?",
        ends=_WORDS,
    ),
    OffTheme(
        begun="The vending machine on platform nine sells nothing but",
        question="What does the vending machine on platform nine sell?",
        ends=_FOODS,
    ),
    OffTheme(
        begun="The night train from platform nine goes to",
        question="Where does the night train from platform nine go?",
        ends=_TOWNS,
    ),
    OffTheme(
        begun="The goalkeeper of the football club is called",
        question="What is the goalkeeper of the football club called?",
        ends=("Ottoline Pfeiffer", "Wendell Okafor", "Ingrid Castellano", "Bartholomew Quist"),
    ),
    OffTheme(
        begun="The robot in the laboratory is named",
        question="What is the robot in the laboratory named?",
        ends=_WORDS,
    ),
    OffTheme(
        begun="The dentist's favourite ice cream flavour is",
        question="What is the dentist's favourite ice cream flavour?",
        ends=_FOODS,
    ),
    OffTheme(
        begun="The headquarters of the bicycle company are in",
        question="Where are the headquarters of the bicycle company?",
        ends=_TOWNS,
    ),
)
