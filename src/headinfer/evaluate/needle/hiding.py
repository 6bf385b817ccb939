"""A sentence hidden in a text at several depths, and asked for: what such tasks share."""

import random
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from headinfer.errors import OptionError
from headinfer.evaluate.answers.record import Labels, Record, scores_by
from headinfer.evaluate.prompts.haystack import Haystack, frame
from headinfer.units import counted_tokens

if TYPE_CHECKING:
    from headinfer.evaluate.answers.answering import Answerer

_NEW_TOKENS = 16

_Task = TypeVar("_Task", bound="Hiding")


@dataclass(frozen=True, slots=True, kw_only=True)
class Hidden:
    """A sentence that is hidden, and how it is asked for.

    Attributes:
        sentence: with the space before it.
        message: of the user, before and after the text.
        begun: beginning of the answer, which the model goes on with.
        answer: what a right answer has in it.
        labels: what sets it apart, beside its depth and its number.
    """

    sentence: str
    message: tuple[str, str]
    begun: str
    answer: str
    labels: Labels = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Hiding(ABC):
    """A task of hidden sentences: depths x samples at each context.

    Attributes:
        depths: where a sentence lies, as shares of the text: 0 for its beginning, 1 for its end.
        samples: sentences at each depth.
        seed: of what is drawn, and of the place that the text begins at.
        raw: whether the model's chat template is left out.
        text: path of the text; None for the task's own.
        name: of the verb.

    Raises:
        OptionError: a value is out of range.
    """

    depths: tuple[float, ...]
    samples: int = 1
    seed: int = 0
    raw: bool = False
    text: str | None = None
    name: str

    def __post_init__(self) -> None:
        if not self.depths or len(set(self.depths)) < len(self.depths):
            raise OptionError("depths must be named, each once")
        for depth in self.depths:
            if not 0 <= depth <= 1:
                raise OptionError(f"a depth is from 0 to 1, not {depth:g}")
        if self.samples < 1:
            raise OptionError(f"samples must be at least 1, not {self.samples}")

    @abstractmethod
    def haystack(self, tokenizer: Any, context_tokens: int) -> Haystack:
        """Return the text that sentences are hidden in."""

    @abstractmethod
    def hidden(self, drawn: random.Random, sample: int) -> Hidden:
        """Return the sentence of a sample.

        Args:
            drawn: draws what differs from question to question.
            sample: its number.
        """

    @property
    def max_new_tokens(self) -> int:
        """The most tokens of an answer."""
        return _NEW_TOKENS

    def questions(self, context_tokens: int) -> int:
        """Return how many sentences there are at a context."""
        return len(self.depths) * self.samples

    def records(
        self, context_tokens: int, answerer: "Answerer", done: Collection[str]
    ) -> Iterator[Record]:
        """Ask for each sentence in a prompt of its own.

        Raises:
            OptionError: the prompt is too short for the sentence and the question.
        """
        haystack = self.haystack(answerer.tokenizer, context_tokens)
        for sample in range(self.samples):
            for depth in self.depths:
                question = f"depth {float(depth)!r}, sample {sample}"
                if question not in done:
                    # A text as a seed gives the same numbers in every version of Python.
                    drawn = random.Random(f"{self.seed}/{context_tokens}/{question}")
                    hidden = self.hidden(drawn, sample)
                    sentences = _Sentences(haystack, drawn.randrange(len(haystack)), depth)
                    prompt = self._prompt(context_tokens, answerer.tokenizer, sentences, hidden)
                    answer = answerer.answer(prompt, _NEW_TOKENS, stop=("\n",))
                    yield Record(
                        question=question,
                        labels={"depth": depth, "sample": sample, **hidden.labels},
                        expected=(hidden.answer,),
                        score=float(hidden.answer.lower() in answer.text.lower()),
                        answer=answer,
                    )

    def _prompt(
        self, context_tokens: int, tokenizer: Any, sentences: "_Sentences", hidden: Hidden
    ) -> list[int]:
        around = frame(tokenizer, hidden.message, hidden.begun, raw=self.raw)
        fact = tokenizer(hidden.sentence, add_special_tokens=False)["input_ids"]
        room = context_tokens - around.tokens - len(fact)
        if room < 0:
            raise OptionError(
                f"a prompt of {counted_tokens(context_tokens)} is too short for the fact and "
                f"the question; give at least {context_tokens - room:,} with --contexts"
            )
        return around.around(sentences.around(fact, room))

    def scores(self, records: Sequence[Record]) -> dict[str, float | None]:
        """Return the share of the sentences found at each depth."""
        return scores_by("depth", self.depths, records)

    def to_json(self) -> dict[str, Any]:
        """Return the task as JSON values."""
        return asdict(self) | {"depths": list(self.depths)}

    @classmethod
    def from_json(cls: type[_Task], values: Mapping[str, Any]) -> _Task:
        """Return the task that `to_json` gave."""
        return cls(**(dict(values) | {"depths": tuple(values["depths"])}))


@dataclass(frozen=True, slots=True)
class _Sentences:
    """A place in a text.

    Attributes:
        haystack: the text.
        first: number of the first sentence that is taken.
        depth: where a sentence is put among those taken.
    """

    haystack: Haystack
    first: int
    depth: float

    def around(self, fact: list[int], tokens: int) -> list[list[int]]:
        """Return sentences of so many tokens in all, with another one put between them."""
        sentences = self.haystack.sentences(self.first, tokens)
        place = round(self.depth * len(sentences))
        return [*sentences[:place], fact, *sentences[place:]]
