"""A needle in a haystack: a fact that no model knows by heart, hidden in prose.

The fact lies at several depths of prompts of several lengths, as in Figure 6 of the paper.
"""

import random
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from headinfer.errors import OptionError
from headinfer.evaluate.answers.record import Record, scores_by
from headinfer.evaluate.prompts.haystack import PROSE_PACKAGE, Haystack, frame, prose
from headinfer.units import format_tokens

if TYPE_CHECKING:
    from headinfer.evaluate.answers.answering import Answerer

_SYLLABLES = ("bar", "den", "fol", "gri", "har", "kes", "lom", "mir", "nov", "pel", "ros", "tav")
_NAME_SYLLABLES = 3
_DIGITS = 5
_NEW_TOKENS = 16

_MESSAGE = (
    "A special number is hidden in the text below. Find it and remember it.\n\n",
    "\n\nWhat is the special number of {name} that the text above mentions?",
)
_FACT = " The special number of {name} is {number}."
_BEGUN = "The special number of {name} is"


@dataclass(frozen=True, slots=True, kw_only=True)
class Needle:
    """A task of hidden facts: depths x samples at each context.

    Attributes:
        depths: where the fact lies, as shares of the prose: 0 for its beginning, 1 for its end.
        samples: facts at each depth.
        seed: of names, numbers and the place that the prose begins at.
        raw: whether the model's chat template is left out.
        text: path of the prose; None for the package's.
        name: of the verb.

    Raises:
        OptionError: a value is out of range.
    """

    depths: tuple[float, ...]
    samples: int = 1
    seed: int = 0
    raw: bool = False
    text: str | None = None
    name: str = "needle"

    def __post_init__(self) -> None:
        if not self.depths or len(set(self.depths)) < len(self.depths):
            raise OptionError("depths must be named, each once")
        for depth in self.depths:
            if not 0 <= depth <= 1:
                raise OptionError(f"a depth is from 0 to 1, not {depth:g}")
        if self.samples < 1:
            raise OptionError(f"samples must be at least 1, not {self.samples}")

    @property
    def max_new_tokens(self) -> int:
        """The most tokens of an answer."""
        return _NEW_TOKENS

    def questions(self, context_tokens: int) -> int:
        """Return how many facts there are at a context."""
        return len(self.depths) * self.samples

    def records(
        self, context_tokens: int, answerer: "Answerer", done: Collection[str]
    ) -> Iterator[Record]:
        """Ask for each fact in a prompt of its own.

        Raises:
            OptionError: the prompt is too short for the fact and the question.
        """
        haystack = Haystack(prose(self.text), answerer.tokenizer)
        for sample in range(self.samples):
            for depth in self.depths:
                question = f"depth {float(depth)!r}, sample {sample}"
                if question not in done:
                    # A text as a seed gives the same numbers in every version of Python.
                    drawn = random.Random(f"{self.seed}/{context_tokens}/{question}")
                    name, number = (
                        made_up_name(drawn),
                        str(drawn.randrange(10 ** (_DIGITS - 1), 10**_DIGITS)),
                    )
                    first = drawn.randrange(len(haystack))
                    prompt = self._prompt(
                        context_tokens, answerer.tokenizer, haystack, (name, number, depth, first)
                    )
                    answer = answerer.answer(prompt, _NEW_TOKENS, stop=("\n",))
                    yield Record(
                        question=question,
                        labels={"depth": depth, "sample": sample},
                        expected=(number,),
                        score=float(number in answer.text),
                        answer=answer,
                    )

    def _prompt(
        self,
        context_tokens: int,
        tokenizer: Any,
        haystack: Haystack,
        hidden: tuple[str, str, float, int],
    ) -> list[int]:
        name, number, depth, first = hidden
        before, after = (part.format(name=name) for part in _MESSAGE)
        around = frame(tokenizer, (before, after), _BEGUN.format(name=name), raw=self.raw)
        fact = tokenizer(_FACT.format(name=name, number=number), add_special_tokens=False)
        room = context_tokens - around.tokens - len(fact["input_ids"])
        if room < 0:
            raise OptionError(
                f"a prompt of {format_tokens(context_tokens)} tokens is too short for the fact and "
                f"the question; give at least {context_tokens - room:,} with --contexts"
            )
        sentences = haystack.sentences(first, room)
        place = round(depth * len(sentences))
        return around.around([*sentences[:place], fact["input_ids"], *sentences[place:]])

    def told(self) -> list[str]:
        """Return where the prose is from."""
        return [f"facts hidden in {self.text or PROSE_PACKAGE}"]

    def scores(self, records: Sequence[Record]) -> dict[str, float | None]:
        """Return the share of the facts found at each depth."""
        return scores_by("depth", self.depths, records)

    def remarks(self, records: Sequence[Record]) -> list[str]:
        """Return nothing: the scores tell all."""
        return []

    def to_json(self) -> dict[str, Any]:
        """Return the task as JSON values."""
        return asdict(self) | {"depths": list(self.depths)}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Needle":
        """Return the task that `to_json` gave."""
        return cls(**(dict(values) | {"depths": tuple(values["depths"])}))


def made_up_name(drawn: random.Random) -> str:
    """Return a name that nobody has."""
    return "".join(drawn.choice(_SYLLABLES) for _ in range(_NAME_SYLLABLES)).capitalize()
