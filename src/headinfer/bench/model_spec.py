"""Which model is measured, and the arithmetic of its bounds. Pure Python, never torch."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from headinfer.errors import OptionError
from headinfer.plan.format import Format
from headinfer.plan.predict import active_parameters
from headinfer.plan.shape import LayerKind, LayerShape, ModelShape
from headinfer.units import counted

DTYPE_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
"""Bytes of one element of each dtype a benchmark can use."""


_LOADED_IN_BYTES = {"4bit": 4.5 / 8, "8bit": 1.0}
"""Bytes of a layer's weight that is quantised as it is loaded: 4 bits have a scale for each 64."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """A Llama of random weights, by shape; embeddings are not tied.

    Attributes:
        layers: decoder layers.
        hidden_size: width of the residual stream.
        heads: query heads.
        kv_heads: key/value heads.
        head_dim: elements of one head's key, and of its value.
        intermediate_size: width of the MLP.
        vocab_size: width of the logits.

    Raises:
        OptionError: there is no such model.
    """

    layers: int
    hidden_size: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int

    def __post_init__(self) -> None:
        for name, number in asdict(self).items():
            if number < 1:
                raise OptionError(f"{name} must be at least 1, not {number}")
        if self.heads % self.kv_heads:
            raise OptionError(
                f"heads ({self.heads}) must be a multiple of kv_heads ({self.kv_heads})"
            )
        if self.head_dim % 2:
            raise OptionError(f"head_dim must be even for rotary embeddings, not {self.head_dim}")

    @property
    def layer_parameters(self) -> int:
        """Parameters of all decoder layers and the final norm."""
        attention = self.hidden_size * self.head_dim * 2 * (self.heads + self.kv_heads)
        mlp = 3 * self.hidden_size * self.intermediate_size
        return self.layers * (attention + mlp + 2 * self.hidden_size) + self.hidden_size

    @property
    def head_parameters(self) -> int:
        """Parameters of the output projection; the embedding has as many."""
        return self.vocab_size * self.hidden_size

    @property
    def parameters(self) -> int:
        """All parameters."""
        return self.layer_parameters + 2 * self.head_parameters

    def weight_bytes(self, dtype: str) -> float:
        """Bytes of the weights that a token is multiplied with."""
        return (self.layer_parameters + self.head_parameters) * DTYPE_BYTES[dtype]

    @property
    def description(self) -> str:
        """The model in words."""
        return (
            f"Llama, random weights: {counted(self.layers, 'layer')}, hidden {self.hidden_size}, "
            f"{self.heads} query and {counted(self.kv_heads, 'KV head')} of {self.head_dim}"
        )

    def kv_bytes(self, tokens: int, dtype: str) -> int:
        """Bytes of keys and values that `tokens` tokens leave in all layers."""
        elements = 2 * self.layers * self.kv_heads * self.head_dim
        return tokens * elements * DTYPE_BYTES[dtype]

    def attention_flops(self, first: int, tokens: int) -> float:
        """Operations of attention for `tokens` queries, causal, the first at position `first`."""
        pairs = _pairs(first, tokens, math.inf)
        return 2.0 * 2.0 * self.layers * self.heads * self.head_dim * pairs

    def shape(self, dtype: str) -> ModelShape:
        """Return the model as the planner sees it."""
        layer = LayerShape(
            kind=LayerKind.FULL,
            kv_heads=self.kv_heads,
            key_dim=self.head_dim,
            value_dim=self.head_dim,
        )
        return ModelShape(
            name="LlamaForCausalLM",
            layers=(layer,) * self.layers,
            query_heads=self.heads,
            hidden_size=self.hidden_size,
            mlp_width=self.intermediate_size,
            vocab_size=self.vocab_size,
            weights_bytes=self.parameters * DTYPE_BYTES[dtype],
            kv_itemsize=DTYPE_BYTES[dtype],
            max_positions=0,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class NamedModel:
    """A model by the name a user has for it.

    Attributes:
        name: a preset, a folder or a hub id.
        location: where its weights are; None for random ones.
        config: its config, for random weights; None where the location has it.
        planned: its shape.
        load_in: "4bit" or "8bit" where its weights are quantised as they are loaded.
    """

    name: str
    location: str | None
    config: Mapping[str, Any] | None
    planned: ModelShape
    load_in: str | None = None

    @property
    def layers(self) -> int:
        """Decoder layers."""
        return len(self.planned.layers)

    @property
    def vocab_size(self) -> int:
        """Width of the logits."""
        return self.planned.vocab_size

    @property
    def layer_parameters(self) -> int:
        """Parameters of all decoder layers that one token is multiplied with."""
        return active_parameters(self.planned)

    @property
    def head_parameters(self) -> int:
        """Parameters of the output projection."""
        return self.planned.vocab_size * self.planned.hidden_size

    def weight_bytes(self, dtype: str) -> float:
        """Bytes of the weights that a token is multiplied with, as they are loaded."""
        size = DTYPE_BYTES[dtype]
        of_layers = size if self.load_in is None else _LOADED_IN_BYTES[self.load_in]
        return self.layer_parameters * of_layers + self.head_parameters * size

    @property
    def description(self) -> str:
        """The model in words."""
        weights = "random weights" if self.location is None else "its own weights"
        if self.load_in is not None:
            weights += f" in {self.load_in}"
        layers, heads = counted(self.layers, "layer"), counted(self.planned.kv_heads, "KV head")
        return f"{self.name}, {weights}: {layers}, {heads}"

    def kv_bytes(self, tokens: int, dtype: str) -> int:
        """Bytes of keys and values that `tokens` tokens leave in all layers."""
        return self.shape(dtype).standard_kv_bytes(tokens)

    def attention_flops(self, first: int, tokens: int) -> float:
        """Operations of attention for `tokens` queries, causal, the first at position `first`."""
        return sum(
            2.0
            * self.planned.query_heads
            * (layer.key_dim + layer.value_dim)
            * _pairs(first, tokens, layer.window_tokens or math.inf)
            for layer in self.planned.layers
        )

    def shape(self, dtype: str) -> ModelShape:
        """Return the model as the planner sees it."""
        assert self.planned.kv_itemsize == DTYPE_BYTES[dtype], "the shape is made for the run"
        return self.planned


Model = ModelSpec | NamedModel


def _pairs(first: int, tokens: int, window: float) -> float:
    """Return how many keys some queries see together, each itself and those before it."""

    def seen_before(position: float) -> float:
        if position <= window:
            return position * position / 2
        return window * window / 2 + (position - window) * window

    return seen_before(first + tokens) - seen_before(first)


def model_from_json(values: Mapping[str, Any]) -> Model:
    """Return the model whose `asdict` went through JSON."""
    if "planned" not in values:
        return ModelSpec(**values)
    planned = values["planned"]
    layers = tuple(map(_layer_from_json, planned["layers"]))
    return NamedModel(**(dict(values) | {"planned": ModelShape(**(planned | {"layers": layers}))}))


def _layer_from_json(values: Mapping[str, Any]) -> LayerShape:
    own: dict[str, Any] = {"kind": LayerKind(values["kind"])}
    if "host_format" in values:  # older results have none
        own["host_format"] = Format(values["host_format"])
    return LayerShape(**(dict(values) | own))
