"""LongBench v2: questions of four choices about long texts, as in Table 1 of the paper.

Prompt, answer length, extraction and scores are those of github.com/THUDM/LongBench (`pred.py`,
`result.py` and `prompts/0shot.txt` at 2e00731). Two things differ. Answers are greedy, where the
script draws them at temperature 0.1. A prompt is cut in the middle together with its chat template,
where the script cuts the message before.
"""

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headinfer.errors import OptionError
from headinfer.evaluate.answers.record import Record, mean_score
from headinfer.evaluate.prompts import chat
from headinfer.evaluate.prompts.examples import MADE, Example, chosen, hub_examples, read_examples

if TYPE_CHECKING:
    from headinfer.evaluate.answers.answering import Answerer

DATASET = "THUDM/LongBench-v2"

PROMPT = (
    "Please read the following text and answer the question below.\n\n"
    "<text>\n{context}\n</text>\n\n"
    "What is the correct answer to this question: {question}\nChoices:\n"
    "(A) {choice_A}\n(B) {choice_B}\n(C) {choice_C}\n(D) {choice_D}\n\n"
    'Format your response as follows: "The correct answer is (insert answer here)".'
)
"""The official prompt without examples (`prompts/0shot.txt`)."""

NEW_TOKENS = 128
"""The official most tokens of an answer without a chain of thought."""

BEGUN = "The correct answer is ("

_FIELDS = ("_id", "difficulty", "length", "question", "answer", "context")
_CHOICES = tuple(f"choice_{letter}" for letter in "ABCD")
_GROUPS = {
    "easy": ("difficulty", "easy"),
    "hard": ("difficulty", "hard"),
    "short": ("length", "short"),
    "medium": ("length", "medium"),
    "long": ("length", "long"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class LongBenchV2:
    """A task of the benchmark's questions, or of made-up ones in its format.

    Attributes:
        data: path of the official file; None for the hub's; `made` for made-up questions.
        samples: the most questions; fewer than there are get drawn.
        seed: of the draw, and of what is made up.
        raw: whether the model's chat template is left out.
        text: path of the prose for made-up questions; None for the package's.
        begun: whether each answer is begun with `BEGUN`, which is not official.
        name: of the verb.

    Raises:
        OptionError: a value is out of range.
    """

    data: str | None = None
    samples: int = 1
    seed: int = 0
    raw: bool = False
    text: str | None = None
    begun: bool = False
    name: str = "longbench-v2"

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise OptionError(f"samples must be at least 1, not {self.samples}")

    @property
    def max_new_tokens(self) -> int:
        """The most tokens of an answer."""
        return NEW_TOKENS

    def questions(self, context_tokens: int) -> int:
        """Return how many questions there are."""
        if self.data == MADE:
            return self.samples
        return min(self.samples, len(_examples(self.data)))

    def records(
        self, context_tokens: int, answerer: "Answerer", done: Collection[str]
    ) -> Iterator[Record]:
        """Answer each question from a prompt of its own, cut in the middle."""
        from headinfer.evaluate.answers.answering import cut_middle

        for name, example in self._named(context_tokens, answerer.tokenizer, done):
            prompt, begun = self.prompt(example, answerer.tokenizer)
            answer = answerer.answer(cut_middle(prompt, context_tokens), NEW_TOKENS)
            yield Record(
                question=name,
                labels={
                    label: str(example.get(label, ""))
                    for label in ("difficulty", "length", "domain")
                },
                expected=(example["answer"],),
                score=float(extracted(begun + answer.text) == example["answer"]),
                answer=answer,
                measures={"whole_tokens": len(prompt)},
            )

    def prompt(self, example: Example, tokenizer: Any) -> tuple[list[int], str]:
        """Return a question's whole prompt as token ids, and how its answer is begun."""
        begun = BEGUN if self.begun else ""
        text = chat.first_text(tokenizer, filled(example), raw=self.raw)
        if begun and not chat.has_chat(tokenizer, raw=self.raw):
            text += "\n\n"
        special = not chat.has_chat(tokenizer, raw=self.raw)
        return chat.encode(tokenizer, text + begun, special=special), begun

    def _named(
        self, context_tokens: int, tokenizer: Any, done: Collection[str]
    ) -> Iterator[tuple[str, Example]]:
        """Yield the questions that are to be answered, with their names."""
        if self.data == MADE:
            from headinfer.evaluate.longbench.made import made_example

            for number in range(self.questions(context_tokens)):
                if (name := f"made {number}") not in done:
                    yield name, made_example(self, number, context_tokens, tokenizer)
            return
        examples = _examples(self.data)
        for number in chosen(len(examples), self.samples, self.seed):
            if (name := f"{number}: {examples[number]['_id']}") not in done:
                yield name, examples[number]

    def told(self) -> list[str]:
        """Return what sets these questions apart, for people."""
        told = [f"{NEW_TOKENS} tokens an answer at most"]
        if self.data == MADE:
            told.append("MADE-UP questions in the benchmark's format, not LongBench v2 itself")
        if self.begun:
            told.append(f"answers are begun with {BEGUN!r}, which is not official")
        return told

    def remarks(self, records: Sequence[Record]) -> list[str]:
        """Return nothing: a question has a prompt of its own."""
        return []

    def scores(self, records: Sequence[Record]) -> dict[str, float | None]:
        """Return the official scores by group; None where a group has no questions."""
        groups = {"overall": list(records)} | {
            group: [record for record in records if record.labels.get(label) == value]
            for group, (label, value) in _GROUPS.items()
        }
        return {group: mean_score(those) for group, those in groups.items()}

    def to_json(self) -> dict[str, Any]:
        """Return the task as JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "LongBenchV2":
        """Return the task that `to_json` gave."""
        return cls(**values)


def filled(example: Example) -> str:
    """Return the official prompt of an example."""
    fields = {name: example[name].strip() for name in ("context", "question", *_CHOICES)}
    return PROMPT.format(**fields)


def extracted(response: str) -> str | None:
    """Return the letter that a response names, by the official rule; None where it names none."""
    response = response.replace("*", "")
    for pattern in (r"The correct answer is \(([A-D])\)", r"The correct answer is ([A-D])"):
        if match := re.search(pattern, response):
            return match.group(1)
    return None


@lru_cache(maxsize=1)
def _examples(data: str | None) -> list[Example]:
    """Return all questions.

    Raises:
        OptionError: they cannot be had.
    """
    if data is None:
        return hub_examples(
            DATASET,
            split="train",
            remedy=f"or fetch data.json of huggingface.co/datasets/{DATASET} and name it with "
            f"--data, or try --data {MADE}",
        )
    return read_examples(Path(data), (*_FIELDS, *_CHOICES))
