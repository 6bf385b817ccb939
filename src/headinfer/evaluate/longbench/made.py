"""Made-up questions in LongBench v2's format: facts that no model knows, hidden in real prose.

Somewhere in the text an easy question stands with its answer, letter and all, which small models
find too. A hard one asks for what follows from two facts that lie apart, among others like them.
"""

import random
from typing import TYPE_CHECKING, Any

from headinfer.errors import OptionError
from headinfer.evaluate.prompts.examples import Example
from headinfer.evaluate.prompts.haystack import Haystack, prose
from headinfer.units import counted_tokens

if TYPE_CHECKING:
    from headinfer.evaluate.longbench.task import LongBenchV2

_SYLLABLES = ("bar", "den", "fol", "gri", "har", "kes", "lom", "mir", "nov", "pel", "ros", "tav")
_NAME_SYLLABLES = 3
_CHOICES = 4
_SPARE_TOKENS = 32
"""Left for what a tokenizer joins otherwise in the whole prompt."""

_LENGTHS = (("short", 32_000), ("medium", 128_000))
"""The benchmark's names of lengths, each with its most words."""


def made_example(task: "LongBenchV2", number: int, context_tokens: int, tokenizer: Any) -> Example:
    """Return a made-up question whose prompt fills a context.

    Args:
        task: with the seed, and the prose that facts are hidden in.
        number: of the question; every fourth one is hard.
        context_tokens: the most tokens of its prompt.
        tokenizer: of transformers.

    Raises:
        OptionError: the prompt is too short for the facts.
    """
    # A text as a seed gives the same numbers in every version of Python.
    drawn = random.Random(f"{task.seed}/{context_tokens}/longbench-v2/{number}")
    example, facts = (_hard if number % 4 == 3 else _easy)(drawn)
    whole = example | {"_id": f"made-{number}", "domain": MADE_DOMAIN, "context": "".join(facts)}
    room = context_tokens - _SPARE_TOKENS - len(task.prompt(whole, tokenizer)[0])
    if room < 0:
        raise OptionError(
            f"a prompt of {counted_tokens(context_tokens)} is too short for the facts and "
            f"the question; give at least {context_tokens - room:,} with --contexts"
        )
    haystack = Haystack(prose(task.text), tokenizer)
    taken = haystack.sentences(drawn.randrange(len(haystack)), room)
    sentences = [tokenizer.decode(sentence) for sentence in taken]
    places = sorted(drawn.randrange(len(sentences) + 1) for _ in facts)
    for place, fact in reversed(list(zip(places, facts, strict=True))):
        sentences.insert(place, fact)
    text = "".join(sentences).strip()
    words = len(text.split())
    length = next((name for name, most in _LENGTHS if words <= most), "long")
    return whole | {"context": text, "length": length}


MADE_DOMAIN = "made"


def _name(drawn: random.Random) -> str:
    """Return a name that nobody has."""
    return "".join(drawn.choice(_SYLLABLES) for _ in range(_NAME_SYLLABLES)).capitalize()


def _names(drawn: random.Random, count: int) -> list[str]:
    names: list[str] = []
    while len(names) < count:
        if (name := _name(drawn)) not in names:
            names.append(name)
    return names


def _asked(drawn: random.Random, question: str, right: str, wrong: list[str]) -> Example:
    """Return a question with its choices in a drawn order."""
    choices = [right, *wrong]
    drawn.shuffle(choices)
    letters = dict(zip("ABCD", choices, strict=True))
    answer = next(letter for letter, choice in letters.items() if choice == right)
    return {
        "question": question,
        "answer": answer,
        "sub_domain": "",
        **{f"choice_{letter}": choice for letter, choice in letters.items()},
    }


def _easy(drawn: random.Random) -> tuple[Example, list[str]]:
    """Make a question that stands in the text, with its answer."""
    person, *towns = _names(drawn, 1 + _CHOICES)
    question = f"In which town was the merchant {person} born?"
    example = _asked(drawn, question, towns[0], towns[1:])
    fact = f" {question} The correct answer is ({example['answer']}) {towns[0]}."
    return example | {"difficulty": "easy"}, [fact]


def _hard(drawn: random.Random) -> tuple[Example, list[str]]:
    """Make a question that two facts answer together."""
    names = _names(drawn, 3 * _CHOICES)
    people, ships, towns = (names[part::3] for part in range(3))
    facts = [
        f" The captain {person} commands the ship {ship}."
        for person, ship in zip(people, ships, strict=True)
    ] + [
        f" The ship {ship} lies in the harbour of {town}."
        for ship, town in zip(ships, towns, strict=True)
    ]
    question = f"In which harbour lies the ship that the captain {people[0]} commands?"
    example = _asked(drawn, question, towns[0], towns[1:])
    drawn.shuffle(facts)
    return example | {"difficulty": "hard"}, facts
