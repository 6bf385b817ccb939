"""The heads of a model that are looked at, and rows of scores for all of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from transformers import PreTrainedModel

from headinfer.errors import UnsupportedModelError
from headinfer.integration.model_shape import model_shape
from headinfer.integration.support import check_architecture
from headinfer.plan.shape import LayerKind
from headinfer.plan.streaming import kv_heads_of

Rows = list[list[float]]
"""A score for each KV head of each decoder layer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadShape:
    """A description of a model's heads, and of what streaming ones would see.

    Attributes:
        kv_heads: KV heads of each decoder layer.
        layers: those that attend all tokens; only their heads can stream.
        sink_tokens: first tokens that a streaming head sees.
        recent_tokens: newest tokens that it sees.
    """

    kv_heads: tuple[int, ...]
    layers: tuple[int, ...]
    sink_tokens: int
    recent_tokens: int

    @classmethod
    def of(cls, model: PreTrainedModel, sink_tokens: int, recent_tokens: int) -> "HeadShape":
        """Return the heads of a model.

        Raises:
            UnsupportedModelError: it cannot be looked into, or no layer attends all tokens.
        """
        check_architecture(model)
        shape = model_shape(model)
        full = tuple(
            number for number, layer in enumerate(shape.layers) if layer.kind is LayerKind.FULL
        )
        if not full:
            raise UnsupportedModelError(
                f"no layer of {type(model).__name__} attends all tokens, so no head can stream"
            )
        return cls(
            kv_heads=kv_heads_of(shape),
            layers=full,
            sink_tokens=sink_tokens,
            recent_tokens=recent_tokens,
        )

    def rows(self, scores: Mapping[int, Sequence[float]]) -> Rows:
        """Return rows for all layers, with 0 for heads of layers that have no scores."""
        return [list(scores.get(layer, [0.0] * heads)) for layer, heads in enumerate(self.kv_heads)]
