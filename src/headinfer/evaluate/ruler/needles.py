"""RULER's needles: facts among sentences that repeat, facts of the same form, or essays.

The texts, and the order in which numbers are drawn, are those of lm-evaluation-harness
(`lm_eval/tasks/ruler/prepare_niah.py`, after NVIDIA's RULER). The harness lists six million pairs
of words first, which takes seconds and half a GiB. Here a pair is drawn as two words.
"""

import random
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

_TEMPLATE = (
    "Some special magic {values} are hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the {values} afterwards.\n{context}\nWhat are all the special magic "
    "{values} for {query} mentioned in the provided text?"
)
_NEEDLE = "One of the special magic {values} for {key} is: {value}."
_REPEATED = (
    "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
)
_PREFIX = "The special magic {values} for {query} mentioned in the provided text"
_DEPTHS = [round(100 * place / 39) for place in range(40)]
_SHUFFLE_SEED = 42

Draw = Callable[[random.Random], str]
Sentences = Callable[[int], Sequence[str]]
"""Returns the sentences of so many words of an essay."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NeedleForm:
    """A form of needles in a haystack.

    Attributes:
        haystack: "repeat", "needle" or "essay".
        key: what needles are asked by: "words" or "uuids".
        value: what is asked for: "numbers" or "uuids".
        keys: needles with keys of their own.
        values: values of each key.
        queries: keys that are asked for.
    """

    haystack: str
    key: str = "words"
    value: str = "numbers"
    keys: int = 1
    values: int = 1
    queries: int = 1

    @property
    def needles(self) -> int:
        """Needles in a sample."""
        return max(self.keys, self.queries) * self.values

    def step(self, context_tokens: int) -> int:
        """Return the sentences, or words of essays, by which haystacks differ in length."""
        if self.haystack == "essay":
            return 500
        return 25 if context_tokens >= 4096 else 5


FORMS = {
    "niah_single_1": NeedleForm(haystack="repeat"),
    "niah_single_2": NeedleForm(haystack="essay"),
    "niah_single_3": NeedleForm(haystack="essay", value="uuids"),
    "niah_multikey_1": NeedleForm(haystack="essay", keys=4),
    "niah_multikey_2": NeedleForm(haystack="needle"),
    "niah_multikey_3": NeedleForm(haystack="needle", key="uuids", value="uuids"),
    "niah_multivalue": NeedleForm(haystack="essay", values=4),
    "niah_multiquery": NeedleForm(haystack="essay", queries=4),
}


@dataclass(frozen=True, slots=True)
class Hidden:
    """A text with needles in it.

    Attributes:
        text: with the question.
        answers: all that are asked for.
        prefix: the beginning of the answer.
    """

    text: str
    answers: list[str]
    prefix: str


@cache
def _words() -> tuple[list[str], list[str]]:
    from wonderwords import RandomWord

    words = RandomWord()
    adjectives, nouns = (
        sorted(set(words.filter(include_categories=[kind]))) for kind in ("adjectives", "nouns")
    )
    return adjectives, nouns


def draw_word(drawn: random.Random) -> str:
    """Return an adjective and a noun, joined by a hyphen."""
    return "-".join(map(drawn.choice, _words()))


def _draw_number(drawn: random.Random) -> str:
    return str(drawn.randint(10**6, 10**7 - 1))


def _draw_uuid(drawn: random.Random) -> str:
    return str(uuid.UUID(int=drawn.getrandbits(128), version=4))


def hide(
    form: NeedleForm,
    units: int,
    drawn: random.Random,
    *,
    essay: Sentences | None = None,
    word: Draw = draw_word,
) -> Hidden:
    """Hide needles in a haystack.

    Args:
        form: of the needles.
        units: sentences of the haystack, or words of essays.
        drawn: random numbers.
        essay: gives the sentences of essays, for forms with essays.
        word: draws a key of words.
    """
    draw = {"words": word, "numbers": _draw_number, "uuids": _draw_uuid}
    draw_key, draw_value = draw[form.key], draw[form.value]

    def needle(key: str, value: str) -> str:
        return _NEEDLE.format(values=form.value, key=key, value=value)

    keys, values, needles = [], [], []
    for _ in range(max(form.keys, form.queries)):
        keys.append(draw_key(drawn))
        values.append([draw_value(drawn) for _ in range(form.values)])
        needles += [needle(keys[-1], value) for value in values[-1]]
    random.Random(_SHUFFLE_SEED).shuffle(needles)
    if form.haystack == "essay":
        assert essay is not None
        context = _among(list(essay(units)), needles, drawn)
    else:
        sentences = [
            needle(draw_key(drawn), draw_value(drawn)) if form.haystack == "needle" else _REPEATED
            for _ in range(units)
        ]
        places = sorted(drawn.sample(range(units), len(needles)), reverse=True)
        for place, each in zip(places, needles, strict=True):
            sentences.insert(place, each)
        context = "\n".join(sentences)
    asked = drawn.sample(range(len(keys)), form.queries)
    return _question(
        form, context, [keys[each] for each in asked], [values[each] for each in asked]
    )


def _among(sentences: list[str], needles: list[str], drawn: random.Random) -> str:
    """Return sentences with needles at some depths."""
    depths = sorted(
        int(len(sentences) * (depth / 100)) for depth in drawn.sample(_DEPTHS, len(needles))
    )
    parts = []
    for start, end, needle in zip(
        [0, *depths], [*depths, len(sentences)], [*needles, None], strict=True
    ):
        parts.append(" ".join(sentences[start:end]))
        if needle is not None:
            parts.append(needle)
    return " ".join(parts)


def _question(
    form: NeedleForm, context: str, queries: list[str], values: list[list[str]]
) -> Hidden:
    template, kind, verb = _TEMPLATE, form.value, "are"
    if form.queries * form.values == 1:
        for several, one in (("Some", "A"), ("are all", "is"), ("are", "is")):
            template = template.replace(several, one)
        kind, verb = form.value[:-1], "is"
    query = queries[0]
    if len(queries) > 1:
        query = ", ".join(queries[:-1]) + ", and " + queries[-1]
    return Hidden(
        text=template.format(values=kind, context=context, query=query),
        answers=[value for each in values for value in each],
        prefix=f"{_PREFIX.format(values=kind, query=query)} {verb}",
    )
