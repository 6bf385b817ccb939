"""A spec, a quiet progress, and runs on tiny models."""

from typing import Any

import torch

from headinfer.bench.model_spec import NamedModel
from headinfer.evaluate.agreement.run import Agreement, AgreementRow
from headinfer.evaluate.agreement.spec import AgreementSpec
from headinfer.integration.model_shape import model_shape
from headinfer.plan.options import Options
from tiny_models import random_tokens


class Told:
    """A progress that keeps what it is told."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def started(self, what: str, left_s: float | None) -> None:
        self.lines.append(f"begin {what}")

    def moved(self, what: str, left_s: float | None) -> None:
        assert left_s is not None
        self.lines.append(what)

    def finished(self, what: str, outcome: str) -> None:
        self.lines.append(f"{what}: {outcome}")


def agreement_spec(model: Any, *methods: str, **changes: Any) -> AgreementSpec:
    given = {
        "methods": methods,
        "contexts": (150,),
        "dtype": str(model.dtype).removeprefix("torch."),
        "model": NamedModel(name="tiny", location="tiny", config=None, planned=model_shape(model)),
        "settings": Options.parse(device="simulated", chunk_tokens="37", tile_tokens="16"),
    }
    return AgreementSpec(**given | changes)


def rows_of(
    model: Any, *methods: str, tokens: torch.Tensor | None = None, **changes: Any
) -> dict[str, AgreementRow]:
    spec = agreement_spec(model, *methods, **changes)
    if tokens is None:
        tokens = random_tokens(1, max(spec.contexts))
    return {row.method: row for row in Agreement(spec, model, tokens, Told()).rows()}
