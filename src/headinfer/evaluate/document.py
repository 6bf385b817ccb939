"""Results of an evaluation as JSON: a header, and one row for each method and context."""

from dataclasses import asdict, dataclass, field
from hashlib import sha256
from typing import Any

from transformers import PreTrainedModel

from headinfer.bench.document import model_values, provenance, replace_json
from headinfer.bench.machine import hardware
from headinfer.bench.spec import json_values
from headinfer.evaluate.agreement import AgreementRow
from headinfer.evaluate.reading import LOGITS_BYTES, most_tokens
from headinfer.evaluate.spec import AgreementSpec

FORMAT = 1
"""Raised when a field changes its meaning."""


@dataclass(slots=True, kw_only=True)
class AgreementResults:
    """A run and what it has found so far.

    Attributes:
        spec: what is compared.
        header: what the rows share.
        rows: the finished ones.
    """

    spec: AgreementSpec
    header: dict[str, Any]
    rows: list[AgreementRow] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Return the content of a result file."""
        values: dict[str, Any] = json_values(
            {"header": self.header, "rows": [asdict(row) for row in self.rows]}
        )
        return values

    def save(self, path: str) -> None:
        """Replace a file by these results.

        Raises:
            OptionError: it cannot be written; the old file stays.
        """
        replace_json(path, self.to_json(), remedy="make room and run it again")


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
        **spec.values(),
    }
