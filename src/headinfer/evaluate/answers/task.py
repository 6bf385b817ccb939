"""What a task of questions is, and the tasks by name. Pure Python, never torch."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any, Protocol

from headinfer.evaluate.answers.record import Record

if TYPE_CHECKING:
    from headinfer.evaluate.answers.answering import Answerer


class Task(Protocol):
    """A set of questions that can be made anew, the same ones for every method."""

    @property
    def name(self) -> str:
        """The verb's."""

    @property
    def max_new_tokens(self) -> int:
        """The most tokens of all answers in one cache."""

    def questions(self, context_tokens: int) -> int:
        """Return how many questions there are at a context."""

    def records(
        self, context_tokens: int, answerer: "Answerer", done: Collection[str]
    ) -> Iterator[Record]:
        """Answer the questions of a context; yield each record when it is there.

        Args:
            context_tokens: the most tokens of a prompt.
            answerer: answers under the method.
            done: names of questions that need not be answered again.
        """

    def told(self) -> list[str]:
        """Return what sets these questions apart, for people."""

    def scores(self, records: Sequence[Record]) -> dict[str, float | None]:
        """Return the mean score of each group of questions; None where it has no answers."""

    def remarks(self, records: Sequence[Record]) -> list[str]:
        """Return what else the answers of a row tell."""

    def to_json(self) -> dict[str, Any]:
        """Return what `from_json` of its class takes."""


_TASKS = {
    "figure7": "headinfer.evaluate.figure7.task:Figure7",
    "longbench-v2": "headinfer.evaluate.longbench.task:LongBenchV2",
    "needle": "headinfer.evaluate.needle.task:Needle",
    "ruler": "headinfer.evaluate.ruler.task:Ruler",
    "scbench": "headinfer.evaluate.scbench.task:SCBench",
}
"""Where the class of each task is. A class is looked up when it is needed: some are heavy."""


def task_from_json(values: Mapping[str, Any]) -> Task:
    """Return the task that `to_json` gave, by its `name`."""
    module, _, kind = _TASKS[values["name"]].partition(":")
    make: Callable[[Mapping[str, Any]], Task] = getattr(import_module(module), kind).from_json
    return make(values)
