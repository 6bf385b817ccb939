"""What to measure: the model's shape, one trial, and a whole run. Pure Python, never torch."""

import enum
from dataclasses import asdict, dataclass, field
from typing import Any

from headinfer.errors import OptionError
from headinfer.plan.options import Options

DTYPE_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
"""Bytes of one element of each dtype a benchmark can use."""

REFERENCE_METHOD = "standard"
"""The method all others are checked against and compared with."""


class Command(enum.Enum):
    """What is timed."""

    DECODE = "decode"
    PREFILL = "prefill"


def _positive(**numbers: int) -> None:
    for name, number in numbers.items():
        if number < 1:
            raise OptionError(f"{name} must be at least 1, not {number}")


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
        _positive(**asdict(self))
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

    def kv_bytes(self, tokens: int, dtype: str) -> int:
        """Bytes of keys and values that `tokens` tokens leave in all layers."""
        elements = 2 * self.layers * self.kv_heads * self.head_dim
        return tokens * elements * DTYPE_BYTES[dtype]


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Options of `headinfer.attach`, as users write them; see `headinfer.plan.options.Options`.

    Raises:
        OptionError: a value does not parse or is out of range.
    """

    device: str = "auto"
    device_memory: str = "auto"
    chunk_tokens: str = "auto"
    tile_heads: str = "auto"
    tile_tokens: str = "auto"

    def __post_init__(self) -> None:
        Options.parse(**asdict(self))


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialSpec:
    """One fresh process: one method, one prompt, some decode steps.

    Attributes:
        method: name in `headinfer.bench.methods.METHODS`.
        context_tokens: tokens of the prompt.
        new_tokens: decode steps after it.
        dtype: of weights and KV cache.
        seed: of the weights and, offset by one, of the tokens.
        model: shape of the model.
        settings: where to run and how to offload.
    """

    method: str
    context_tokens: int
    new_tokens: int
    dtype: str
    seed: int
    model: ModelSpec
    settings: Settings

    def to_json(self) -> dict[str, Any]:
        """Return the trial as JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "TrialSpec":
        """Return the trial that `to_json` gave."""
        model, settings = ModelSpec(**values["model"]), Settings(**values["settings"])
        return cls(**(values | {"model": model, "settings": settings}))


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchSpec:
    """A whole run: methods x contexts x repeats.

    Attributes:
        command: what is timed.
        methods: names of methods, in the order of the rows.
        contexts: tokens of the prompts.
        new_tokens: decode steps of each trial.
        repeats: fresh processes for each row.
        dtype: of weights and KV cache.
        seed: of weights and tokens.
        model: shape of the model.
        settings: where to run and how to offload.

    Raises:
        OptionError: a value is out of range.
    """

    command: Command
    methods: tuple[str, ...]
    contexts: tuple[int, ...]
    new_tokens: int
    repeats: int
    dtype: str
    model: ModelSpec
    seed: int = 0
    settings: Settings = field(default_factory=Settings)

    def __post_init__(self) -> None:
        _positive(new_tokens=self.new_tokens, repeats=self.repeats)
        if self.dtype not in DTYPE_BYTES:
            raise OptionError(f"dtype must be one of {', '.join(DTYPE_BYTES)}, not {self.dtype!r}")
        if not self.methods:
            raise OptionError("no methods were given; name at least one")
        if len(set(self.methods)) < len(self.methods):
            raise OptionError(f"a method is named twice in {','.join(self.methods)!r}")

    def trial(self, method: str, context_tokens: int) -> TrialSpec:
        """Return the trial of one method at one context."""
        return TrialSpec(
            method=method,
            context_tokens=context_tokens,
            new_tokens=self.new_tokens,
            dtype=self.dtype,
            seed=self.seed,
            model=self.model,
            settings=self.settings,
        )
