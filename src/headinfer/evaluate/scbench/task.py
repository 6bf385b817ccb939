"""SCBench: several questions about one long context, as in Table 2 of the paper.

Its two modes are that of `github.com/microsoft/MInference/scbench`. In turns, each question follows
the one before and its right answer. As requests, each follows the context alone.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any

from headinfer.errors import OptionError
from headinfer.evaluate.answers.record import Record, scores_by, with_average
from headinfer.evaluate.prompts import chat
from headinfer.evaluate.prompts.examples import MADE, Example, chosen
from headinfer.evaluate.scbench import data as scbench_data
from headinfer.evaluate.scbench import prompts as scbench_prompts
from headinfer.evaluate.scbench import scores as scbench_scores
from headinfer.evaluate.scbench.functions import Function
from headinfer.units import counted

if TYPE_CHECKING:
    from headinfer.evaluate.answers.answering import Answerer

MOST_TURNS = 5
"""The official most turns of an example."""


class Mode(str, Enum):
    """A mode in which several questions share a context."""

    TURNS = "multi-turn"
    REQUESTS = "scdq"


@dataclass(frozen=True, slots=True, kw_only=True)
class SCBench:
    """A task of the benchmark's examples, or of made-up ones in its format.

    Attributes:
        tasks: names of the benchmark's own.
        data: path of its files; None for the hub's; `made` for made-up examples.
        mode: how the questions share the context.
        samples: the most examples of each of its tasks; fewer than there are get drawn.
        seed: of the draw, and of what is made up.
        raw: whether the model's chat template is left out.
        name: of the verb.

    Raises:
        OptionError: a value is out of range.
    """

    tasks: tuple[str, ...]
    data: str | None = None
    mode: Mode = Mode.TURNS
    samples: int = 1
    seed: int = 0
    raw: bool = False
    name: str = "scbench"

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise OptionError(f"samples must be at least 1, not {self.samples}")
        known = scbench_data.MADE_TASKS if self.data == MADE else tuple(scbench_prompts.FORMS)
        for task in self.tasks:
            if task not in known:
                made = " made up" if self.data == MADE else ""
                raise OptionError(f"tasks{made} are {', '.join(known)}, not {task!r}")
        if not self.tasks or len(set(self.tasks)) < len(self.tasks):
            raise OptionError("tasks must be named, each once")

    @property
    def max_new_tokens(self) -> int:
        """The most tokens of an answer: none stays in the cache."""
        return max(map(scbench_prompts.most_new_tokens, self.tasks))

    def questions(self, context_tokens: int) -> int:
        """Return how many turns all examples have.

        Raises:
            OptionError: they cannot be had, or a library that their scores need is missing.
        """
        scbench_scores.check_libraries(self.tasks)
        if self.data == MADE:
            return len(self.tasks) * self.samples * MOST_TURNS
        return sum(
            len(example["multi_turns"][:MOST_TURNS])
            for task in self.tasks
            for _, example in self._examples(task)
        )

    def _examples(self, task: str) -> list[tuple[int, Example]]:
        """Return the examples of the data, with their numbers."""
        examples = scbench_data.examples(self.data, task)
        return [(each, examples[each]) for each in chosen(len(examples), self.samples, self.seed)]

    def records(
        self, context_tokens: int, answerer: "Answerer", done: Collection[str]
    ) -> Iterator[Record]:
        """Answer the questions of each example through one cache.

        An example of which an answer is missing is gone through once more.
        """
        for task in self.tasks:
            numbered: Iterable[tuple[int, Example]]
            if self.data == MADE:
                numbered = scbench_data.made_examples(
                    task,
                    self.samples,
                    self.seed,
                    context_tokens,
                    answerer.tokenizer,
                    raw=self.raw,
                )
            else:
                numbered = self._examples(task)
            for number, example in numbered:
                example = dict(example) | {"multi_turns": example["multi_turns"][:MOST_TURNS]}
                names = [
                    f"{task} {number}, turn {turn}" for turn in range(len(example["multi_turns"]))
                ]
                if not set(names) <= set(done):
                    records = self._of_example(task, names, example, (context_tokens, answerer))
                    yield from (record for record in records if record.question not in done)

    def _of_example(
        self,
        task: str,
        names: Sequence[str],
        example: Example,
        asked: tuple[int, "Answerer"],
    ) -> Iterator[Record]:
        from headinfer.evaluate.scbench.sharing import requests, turns

        context_tokens, answerer = asked
        tokenizer, said = answerer.tokenizer, example["multi_turns"]
        texts_of = (
            scbench_prompts.of_turns if self.mode is Mode.TURNS else scbench_prompts.of_requests
        )
        first, *later = texts_of(task, example, tokenizer, raw=self.raw)
        special = not chat.has_chat(tokenizer, raw=self.raw)
        prompts = [
            chat.encode(tokenizer, first, special=special),
            *(chat.encode(tokenizer, text, special=False) for text in later),
        ]
        most = [scbench_prompts.new_tokens(task, turn) for turn in said]
        ask = turns if self.mode is Mode.TURNS else requests
        answers = ask(answerer, prompts, most, context_tokens)
        functions = self._functions(task, example)
        for number, (name, turn, (answer, measures)) in enumerate(
            zip(names, said, answers, strict=True)
        ):
            kind = turn.get("task", task)
            yield Record(
                question=name,
                labels={"task": task, "kind": kind, "turn": number},
                expected=scbench_scores.expected(kind, turn),
                score=scbench_scores.score(kind, answer.text, turn, example, functions),
                answer=answer,
                measures=measures,
            )

    def _functions(self, task: str, example: Example) -> list[Function]:
        """Return the functions of a repository that any example asks for."""
        if "repoqa" not in task:
            return []
        return [
            Function(turn["name"], turn["answer"])
            for _, each in self._examples(task)
            if each["repo"] == example["repo"]
            for turn in each["multi_turns"][:MOST_TURNS]
            if turn.get("task", "scbench_repoqa") == "scbench_repoqa"
        ]

    def told(self) -> list[str]:
        """Return what sets these questions apart, for people."""
        how = {
            Mode.TURNS: "each question follows the one before, and its right answer",
            Mode.REQUESTS: "each question follows the context alone",
        }
        told = [f"{self.mode.value}: {how[self.mode]}"]
        if self.data == MADE:
            told.append("MADE-UP examples in the benchmark's format, not SCBench itself")
        return told

    def scores(self, records: Sequence[Record]) -> dict[str, float | None]:
        """Return the mean score of each task, and the mean of those."""
        found = scores_by("task", self.tasks, records)
        return with_average({task.removeprefix("scbench_"): score for task, score in found.items()})

    def remarks(self, records: Sequence[Record]) -> list[str]:
        """Return what the shared cache saved."""
        if not records:
            return []
        kept = int(sum(record.measures["reused_tokens"] for record in records))
        read = sum(record.answer.read_tokens + record.answer.kept_tokens for record in records)
        saved_s = sum(record.measures["saved_s"] for record in records)
        return [
            f"{kept:,} of {counted(read, 'prompt token')} not computed again, about {saved_s:.1f} "
            "s saved"
        ]

    def to_json(self) -> dict[str, Any]:
        """Return the task as JSON values."""
        return asdict(self) | {"tasks": list(self.tasks), "mode": self.mode.value}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "SCBench":
        """Return the task that `to_json` gave."""
        parts = {"tasks": tuple(values["tasks"]), "mode": Mode(values["mode"])}
        return cls(**(dict(values) | parts))
