"""The model families whose shape is known from their config alone: a table of what sets them apart.

The facts are those of transformers 5.17 to 5.23; a test compares each family with its model there.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from headinfer.errors import ModelLoadError, UnsupportedModelError
from headinfer.estimate.text_config import TextConfig
from headinfer.units import counted

FULL, SLIDING, LINEAR = "full_attention", "sliding_attention", "linear_attention"
"""Types of layers, as configs call them."""

LayerType = Callable[[TextConfig, int], str]
"""Returns the type of the layer at an index when the config lists no `layer_types`."""


def _sliding_if_windowed(config: TextConfig, _layer_idx: int) -> str:
    return SLIDING if config.get("sliding_window") is not None else FULL


def _sliding_after_first(config: TextConfig, layer_idx: int) -> str:
    windowed = config.get("sliding_window") is not None
    return SLIDING if windowed and layer_idx >= config.number("max_window_layers") else FULL


def _sliding_among_first(config: TextConfig, layer_idx: int) -> str:
    windowed = config.get("sliding_window") is not None and layer_idx % 2 == 0
    return SLIDING if windowed and layer_idx < config.number("max_window_layers") else FULL


def _full_every(period: int, *, key: str = "", others: str = SLIDING) -> LayerType:
    """Return the rule of families with one full layer in `period`; a config may say so by `key`."""

    def layer_type(config: TextConfig, layer_idx: int) -> str:
        return others if (layer_idx + 1) % config.size(key, period) else FULL

    return layer_type


@dataclass(frozen=True, slots=True, kw_only=True)
class Experts:
    """A mixture of experts in place of the MLP.

    Attributes:
        width: key of one expert's intermediate width.
        bias: whether experts and router have biases.
        shared: whether one more expert, with a gate, takes every token.
    """

    width: str
    bias: bool = False
    shared: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """A family of models: what sets it apart from Llama's plain layers.

    Whether a projection has a bias is known (a bool) or said by a key of the config.

    Attributes:
        layer_type: the rule for configs without `layer_types`.
        defaults: values of keys that configs leave out.
        window_flag: key without which `sliding_window` means nothing; "" for none.
        qkv_bias: whether query, key and value projections have biases.
        output_bias: whether the attention's output projection has one.
        mlp_bias: whether the MLP's projections have.
        layer_norms: norms of the hidden size in a layer.
        head_norms: whether queries and keys are normalised.
        sinks: whether each query head has an attention sink.
        output_gate: whether queries come with a gate of the same width.
        experts: of a mixture of experts.
        scaled_embedding: whether a buffer scales the embeddings.
        rotary_by_type: whether each type of layer has rotary frequencies of its own.
        partial_rotary: whether heads may be rotated in part.
        fused_gate: whether one projection gives the MLP's gate and up.
        splits_heads: whether transformers' tensor parallelism gives each process some of the heads.
    """

    layer_type: LayerType = _sliding_if_windowed
    defaults: Mapping[str, object] = field(default_factory=dict)
    window_flag: str = ""
    qkv_bias: bool | str = False
    output_bias: bool | str = False
    mlp_bias: bool | str = False
    layer_norms: int = 2
    head_norms: bool = False
    sinks: bool = False
    output_gate: bool = False
    experts: Experts | None = None
    scaled_embedding: bool = False
    rotary_by_type: bool = False
    partial_rotary: bool = False
    fused_gate: bool = False
    splits_heads: bool = True

    def layer_types(self, config: TextConfig) -> list[str]:
        """Return the type of every layer of a model, in order.

        Raises:
            ModelLoadError: `layer_types` is not one name for each layer.
            UnsupportedModelError: a type is not known.
        """
        num_layers = config.size("num_hidden_layers")
        types = config.items("layer_types") or [
            self.layer_type(config, layer_idx) for layer_idx in range(num_layers)
        ]
        if len(types) != num_layers:
            raise ModelLoadError(
                f"the config of {config.name!r} lists {len(types)} layer_types for "
                f"{counted(num_layers, 'layer')}"
            )
        for layer_type in types:
            if layer_type not in (FULL, SLIDING, LINEAR):
                raise UnsupportedModelError(
                    f"{config.name!r} has layers of type {layer_type!r}, whose shape is not known"
                )
        return [str(layer_type) for layer_type in types]


_BIAS = "attention_bias"

FAMILIES: dict[str, Family] = {
    "llama": Family(qkv_bias=_BIAS, output_bias=_BIAS, mlp_bias="mlp_bias"),
    "mistral": Family(defaults={"sliding_window": 4096}),
    "mixtral": Family(experts=Experts(width="intermediate_size")),
    "phi3": Family(partial_rotary=True, fused_gate=True, splits_heads=False),
    "qwen2": Family(
        layer_type=_sliding_after_first,
        defaults={"sliding_window": 4096, "max_window_layers": 28},
        window_flag="use_sliding_window",
        qkv_bias=True,
    ),
    "qwen2_moe": Family(
        layer_type=_sliding_among_first,
        defaults={"sliding_window": 4096, "max_window_layers": 28, "qkv_bias": True},
        window_flag="use_sliding_window",
        qkv_bias="qkv_bias",
        experts=Experts(width="moe_intermediate_size", shared=True),
    ),
    "qwen3": Family(
        layer_type=_sliding_after_first,
        defaults={"sliding_window": 4096, "max_window_layers": 28, "head_dim": 128},
        window_flag="use_sliding_window",
        qkv_bias=_BIAS,
        output_bias=_BIAS,
        head_norms=True,
    ),
    "qwen3_moe": Family(
        defaults={"sliding_window": 4096},
        window_flag="use_sliding_window",
        qkv_bias=_BIAS,
        output_bias=_BIAS,
        head_norms=True,
        experts=Experts(width="moe_intermediate_size"),
    ),
    "qwen3_next": Family(
        layer_type=_full_every(4, key="full_attention_interval", others=LINEAR),
        defaults={"head_dim": 256, "linear_conv_kernel_dim": 4, "partial_rotary_factor": 0.25},
        qkv_bias=_BIAS,
        output_bias=_BIAS,
        head_norms=True,
        output_gate=True,
        experts=Experts(width="moe_intermediate_size", shared=True),
        partial_rotary=True,
    ),
    "gemma2": Family(
        layer_type=_full_every(2),
        defaults={"sliding_window": 4096, "head_dim": 256, "tie_word_embeddings": True},
        qkv_bias=_BIAS,
        output_bias=_BIAS,
        layer_norms=4,
        scaled_embedding=True,
    ),
    "gemma3_text": Family(
        layer_type=_full_every(6, key="sliding_window_pattern"),
        # Gemma 3's published configs say only where they differ from these.
        defaults={
            "vocab_size": 262208,
            "hidden_size": 2304,
            "intermediate_size": 9216,
            "num_hidden_layers": 26,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "head_dim": 256,
            "max_position_embeddings": 131072,
            "sliding_window": 4096,
            "tie_word_embeddings": True,
        },
        qkv_bias=_BIAS,
        output_bias=_BIAS,
        layer_norms=4,
        head_norms=True,
        scaled_embedding=True,
        rotary_by_type=True,
    ),
    "gpt_oss": Family(
        layer_type=_full_every(2),
        defaults={"sliding_window": 128, "head_dim": 64, "attention_bias": True},
        qkv_bias=_BIAS,
        output_bias=_BIAS,
        sinks=True,
        experts=Experts(width="intermediate_size", bias=True),
        splits_heads=False,
    ),
}
"""The families by `model_type`."""

TEXT_PARTS = {"gemma3": "gemma3_text"}
"""Models that also see, and the type of the `text_config` inside their config."""

_INHERITED = ("dtype", "torch_dtype", "quantization_config", "tie_word_embeddings")
"""What a `text_config` takes from the config around it."""


def read_config(config: object, name: str) -> tuple[Family, TextConfig]:
    """Return the family of a model, and the config of its text part with all defaults.

    Args:
        config: the contents of its config.json.
        name: for messages.

    Raises:
        ModelLoadError: this is no model's config.
        UnsupportedModelError: the family is not known.
    """
    if not isinstance(config, Mapping) or not isinstance(config.get("model_type"), str):
        raise ModelLoadError(f"{name!r} is not a model's config: it has no model_type")
    model_type = config["model_type"]
    if model_type in TEXT_PARTS:
        text = TextConfig(name=name, values=config).section("text_config")
        if not text:
            raise ModelLoadError(f"the config of {name!r} has no text_config")
        outer = {key: config[key] for key in _INHERITED if config.get(key) is not None}
        config = outer | {key: value for key, value in text.items() if value is not None}
        model_type = TEXT_PARTS[model_type]
    if model_type not in FAMILIES:
        raise UnsupportedModelError(
            f"the shape of {name!r}, of model type {model_type!r}, cannot be told from its config "
            f"alone; known are {', '.join([*FAMILIES, *TEXT_PARTS])}"
        )
    family = FAMILIES[model_type]
    values = {**family.defaults, **config}
    if family.window_flag and not values.get(family.window_flag):
        values["sliding_window"] = None
    return family, TextConfig(name=name, values=values)
