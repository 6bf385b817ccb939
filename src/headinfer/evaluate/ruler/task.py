"""RULER as a task of the evaluation's runs."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from headinfer.errors import OptionError
from headinfer.evaluate.answers.record import Record, scores_by, with_average
from headinfer.evaluate.ruler.kinds import KINDS, check_kinds
from headinfer.units import counted

if TYPE_CHECKING:
    from headinfer.evaluate.answers.answering import Answerer


@dataclass(frozen=True, slots=True, kw_only=True)
class Ruler:
    """A choice of RULER's tasks, with so many samples of each at every context.

    A context is the most tokens of prompt and answer together, as RULER counts: without the chat
    template, and without the beginning of the answer.

    Attributes:
        kinds: names of tasks.
        samples: of each task.
        seed: of what is drawn.
        raw: whether the model's chat template is left out.
        data: folder with the files that some tasks need.
        name: of the verb.

    Raises:
        OptionError: a value is out of range, or a file is missing.
    """

    kinds: tuple[str, ...]
    samples: int = 1
    seed: int = 0
    raw: bool = False
    data: str | None = None
    name: str = "ruler"

    def __post_init__(self) -> None:
        check_kinds(self.kinds)
        if self.samples < 1:
            raise OptionError(f"samples must be at least 1, not {self.samples}")

    @property
    def max_new_tokens(self) -> int:
        """The most tokens of an answer, whichever task it is of."""
        return max(KINDS[kind].new_tokens for kind in self.kinds)

    def questions(self, context_tokens: int) -> int:
        """Return how many samples there are at a context."""
        return len(self.kinds) * self.samples

    def records(
        self, context_tokens: int, answerer: "Answerer", done: Collection[str]
    ) -> Iterator[Record]:
        """Answer the samples of each task in turn.

        Raises:
            OptionError: a task has no samples so short.
        """
        for kind in self.kinds:
            wanted = {f"{kind}/{number}": number for number in range(self.samples)}
            missing = {name: number for name, number in wanted.items() if name not in done}
            if missing:
                yield from self._records(kind, context_tokens, answerer, missing)

    def _records(
        self, kind: str, context_tokens: int, answerer: "Answerer", wanted: Mapping[str, int]
    ) -> Iterator[Record]:
        from headinfer.evaluate.harness.answering import AnsweringLM
        from headinfer.evaluate.ruler.form import Form
        from headinfer.evaluate.ruler.samples import Maker

        lm = AnsweringLM(answerer)
        chat = bool(lm.tokenizer.chat_template) and not self.raw
        maker = Maker(kind, context_tokens, lm.tokenizer, seed=self.seed, folder=self.data)
        form: Form | None = None
        for question, number in wanted.items():
            sample = maker.sample(number)
            form = form or Form(kind, context_tokens, sample)
            answer = lm.answer(form.prompt(sample, lm, chat=chat), form.gen_kwargs)
            yield Record(
                question=question,
                labels={"kind": kind},
                expected=tuple(sample.outputs),
                score=form.score(sample, answer.text),
                answer=answer,
            )

    def told(self) -> list[str]:
        """Return whose prompts, settings and measures these are."""
        return [
            f"prompts and measures of lm-evaluation-harness, {counted(self.samples, 'sample')} a "
            "task"
        ]

    def scores(self, records: Sequence[Record]) -> dict[str, float | None]:
        """Return the mean over the tasks, and the mean score of each, as RULER tells them."""
        return with_average(scores_by("kind", self.kinds, records))

    def remarks(self, records: Sequence[Record]) -> list[str]:
        """Return nothing: the scores tell all."""
        return []

    def to_json(self) -> dict[str, Any]:
        """Return the task as JSON values."""
        return asdict(self) | {"kinds": list(self.kinds)}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Ruler":
        """Return the task that `to_json` gave."""
        return cls(**(dict(values) | {"kinds": tuple(values["kinds"])}))
