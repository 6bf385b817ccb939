"""Results of an evaluation as JSON: a header, and one row for each method and context."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from hashlib import sha256
from typing import Any, ClassVar

from transformers import PreTrainedModel

from headinfer.bench.document import model_values, provenance
from headinfer.bench.files import ResultFile, check_continues, joined
from headinfer.bench.machine import hardware
from headinfer.bench.result import Status
from headinfer.bench.spec import json_values
from headinfer.errors import OptionError
from headinfer.evaluate.agreement.run import AgreementRow
from headinfer.evaluate.agreement.spec import AgreementSpec
from headinfer.evaluate.reading import LOGITS_BYTES, most_tokens

FORMAT = 2
"""Raised when a field changes its meaning."""


@dataclass(slots=True, kw_only=True)
class AgreementResults(ResultFile):
    """A run and what it has found so far.

    Attributes:
        spec: what is compared.
        header: what the rows share.
        rows: the finished ones.
    """

    version: ClassVar[int] = FORMAT
    verb: ClassVar[str] = "evaluate agreement"

    spec: AgreementSpec
    header: dict[str, Any]
    rows: list[AgreementRow] = field(default_factory=list)

    @property
    def arranged_rows(self) -> list[AgreementRow]:
        """The rows in the order of a table: by context, then by method."""
        by_key = {(row.method, row.context_tokens): row for row in self.rows}
        keys = [(method, tokens) for tokens in self.spec.contexts for method in self.spec.methods]
        return [by_key[key] for key in keys if key in by_key]

    def to_json(self) -> dict[str, Any]:
        """Return the content of a result file."""
        rows = [asdict(row) for row in self.arranged_rows]
        values: dict[str, Any] = json_values({"header": self.header, "rows": rows})
        return values

    @property
    def done(self) -> set[tuple[str, int]]:
        """Method and context of the rows that need not be compared again."""
        return {
            (row.method, row.context_tokens) for row in self.rows if row.status is not Status.FAILED
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "AgreementResults":
        """Return the results that `to_json` gave."""
        head = values["header"]
        rows = [AgreementRow(**(row | {"status": Status(row["status"])})) for row in values["rows"]]
        return cls(spec=AgreementSpec.from_json(head["spec"]), header=head, rows=rows)

    def continued(self, now: "AgreementResults") -> "AgreementResults":
        """Return these results as the beginning of another run.

        Methods and contexts may be others; all else, and the text, must be as it was.

        Args:
            now: results of the other run, which has no rows yet.

        Raises:
            OptionError: the runs differ, so that their rows do not belong into one file.
        """
        check_continues(self.header, now.header, but={"methods", "contexts"})
        if self.header["text"]["sha256"] != now.header["text"]["sha256"]:
            raise OptionError(
                "--resume: the results are of another text; give another --json, or leave out "
                "--resume to begin anew"
            )
        whole = joined(now.spec, self.spec)
        rows = [row for row in self.rows if row.status is not Status.FAILED]
        merged = now.header | {"spec": whole.to_json(), "date": self.header["date"]}
        return replace(self, spec=whole, header=merged, rows=rows)


def header(
    spec: AgreementSpec, model: PreTrainedModel, text_name: str, text: str, text_tokens: int
) -> dict[str, Any]:
    """Return what the rows share: where, when and with what they were measured.

    Args:
        spec: what is compared.
        model: the model, loaded.
        text_name: where the text is from.
        text: all of it.
        text_tokens: how many tokens it has.
    """
    return {
        "format": FORMAT,
        "command": "agreement",
        **provenance(),
        "device": model.device.type,
        "hardware": hardware(model.device),
        "model": model_values(spec.model),
        "stock_attention": model.config.get_text_config(decoder=True)._attn_implementation,
        "text": {
            "name": text_name,
            "tokens": text_tokens,
            "sha256": sha256(text.encode()).hexdigest(),
        },
        "logits_bytes_of_a_pass": LOGITS_BYTES,
        "most_pass_tokens": most_tokens(model),
        "dtype": spec.dtype,
        "spec": spec.to_json(),
    }
