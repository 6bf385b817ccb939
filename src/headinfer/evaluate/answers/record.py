"""Answers of a method to questions, with their scores. Pure Python, never torch."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

Labels = Mapping[str, str | int | float]
"""What sets a question apart from the others of its row, such as its depth or its kind."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """An answer as generated, greedily.

    Attributes:
        text: without special tokens, up to the first stop text.
        tokens: as generated, the token that ended it among them.
        ties: for each token, whether the two best logits were within a rounding of their dtype.
        prompt_tokens: tokens before the answer, if nothing had been cut.
        read_tokens: how many of them passed through the model for this answer.
        kept_tokens: how many the cache held already.
        prefill_s: seconds until the first token.
        decode_s: seconds of all further tokens.
    """

    text: str
    tokens: tuple[int, ...]
    ties: tuple[bool, ...]
    prompt_tokens: int
    read_tokens: int
    kept_tokens: int = 0
    prefill_s: float
    decode_s: float

    @property
    def is_cut(self) -> bool:
        """Whether the method saw less than the whole prompt."""
        return self.read_tokens + self.kept_tokens < self.prompt_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """An answer to one question, with its score.

    Attributes:
        question: a name, unlike all others of the row; the same for every method.
        labels: what sets the question apart.
        expected: right answers.
        score: from 0 to 1, by the task's own measure.
        answer: what the method said.
        measures: further figures of the task's own.
    """

    question: str
    expected: tuple[str, ...]
    score: float
    answer: Answer
    labels: Labels = field(default_factory=dict)
    measures: Mapping[str, float] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return the record as JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Record":
        """Return the record that `to_json` gave."""
        answer = dict(values["answer"])
        for name in ("tokens", "ties"):
            answer[name] = tuple(answer[name])
        parts = {"expected": tuple(values["expected"]), "answer": Answer(**answer)}
        return cls(**(dict(values) | parts))


@dataclass(frozen=True, slots=True, kw_only=True)
class Likeness:
    """A count of how many answers of a method are stock's, token by token.

    Attributes:
        compared: questions that both answered from the same prompt.
        same: how many of them have the same tokens.
        tied: how many first differ where stock's two best tokens are tied.
    """

    compared: int
    same: int
    tied: int

    @property
    def differing(self) -> int:
        """How many differ, and not by a tie."""
        return self.compared - self.same - self.tied


def likeness(stock: Sequence[Record], method: Sequence[Record]) -> Likeness:
    """Compare a method's answers with stock's; what either answered from a cut prompt is left out.

    Args:
        stock: records of the reference.
        method: of the method, in any order.
    """
    by_question = {record.question: record.answer for record in stock}
    pairs = [
        (by_question[record.question], record.answer)
        for record in method
        if record.question in by_question
    ]
    pairs = [pair for pair in pairs if not (pair[0].is_cut or pair[1].is_cut)]
    differing = [pair for pair in pairs if pair[0].tokens != pair[1].tokens]
    return Likeness(
        compared=len(pairs),
        same=len(pairs) - len(differing),
        tied=sum(_by_a_tie(*pair) for pair in differing),
    )


def _by_a_tie(stock: Answer, method: Answer) -> bool:
    """Whether stock's two best tokens are tied where the answers first differ."""
    for place, (one, other) in enumerate(zip(stock.tokens, method.tokens, strict=False)):
        if one != other:
            return stock.ties[place]
    return False  # one goes on where the other ended, so a token was dropped


def mean_score(records: Sequence[Record]) -> float | None:
    """Return the mean score of some answers; None for none."""
    return sum(record.score for record in records) / len(records) if records else None


def scores_by(
    label: str, values: Sequence[str | int | float], records: Sequence[Record]
) -> dict[str, float | None]:
    """Return the mean score of the answers with each value of a label.

    Args:
        label: its name.
        values: in the order of the result.
        records: of any values.
    """
    return {
        f"{value:g}" if isinstance(value, float) else str(value): mean_score(
            [record for record in records if record.labels[label] == value]
        )
        for value in values
    }


def with_average(scores: Mapping[str, float | None]) -> dict[str, float | None]:
    """Return scores of groups behind the mean of those that are there."""
    there = [score for score in scores.values() if score is not None]
    return {"average": sum(there) / len(there) if there else None, **scores}
