"""The shape of a model from its config.json: no weights, no torch, no transformers."""

from collections.abc import Mapping
from pathlib import Path

from headinfer.errors import ModelLoadError, OptionError
from headinfer.estimate.checkpoint import checkpoint_bytes
from headinfer.estimate.families import FULL, LINEAR, Family, read_config
from headinfer.estimate.parameters import ParameterCount, buffers_bytes, count_parameters
from headinfer.estimate.quantization import UNPACKED, stored_bytes
from headinfer.estimate.text_config import TextConfig
from headinfer.plan.memory import fused_mlp_elements
from headinfer.plan.shape import LayerKind, LayerShape, ModelShape

_ITEMSIZES = {"float32": 4, "bfloat16": 2, "float16": 2}
_DEFAULT_DTYPE = "bfloat16"


def shape_from_config(
    config: Mapping[str, object],
    *,
    name: str,
    dtype: str | None = None,
    folder: Path | None = None,
) -> ModelShape:
    """Return the shape a model has once loaded: what `model_shape` says of it, name aside.

    The shape of a model that also sees is its text part: its vision tower is not counted. Quantised
    weights are counted as the checkpoint stores them (see `headinfer.estimate.quantization`).

    Args:
        config: the contents of its config.json.
        name: of the shape, and for messages.
        dtype: of the weights that are not quantised and of the KV cache: "float32", "bfloat16" or
            "float16". None is the one the config names, or bfloat16 if it names none.
        folder: with the weights' files, whose headers tell what quantised weights take; None where
            they are not at hand.

    Raises:
        ModelLoadError: this is no model's config, or it misses a value or has an impossible one.
        UnsupportedModelError: models of this type are not known.
        OptionError: there is no such dtype.
    """
    if dtype not in (None, *_ITEMSIZES):
        raise OptionError(f"dtype {dtype!r} is not one of {', '.join(_ITEMSIZES)}")
    family, text = read_config(config, name)
    itemsize = _itemsize(text, dtype)
    count = count_parameters(family, text)
    # Files of a model that also sees have more than its text part.
    files = folder if config.get("text_config") is None else None
    stored = _stored_bytes(text, count, itemsize, files)
    matrix_bytes = text.size("vocab_size") * text.size("hidden_size") * itemsize
    return ModelShape(
        name=name,
        layers=_layers(family, text),
        query_heads=text.size("num_attention_heads"),
        hidden_size=text.size("hidden_size"),
        mlp_width=_mlp_width(text),
        vocab_size=text.size("vocab_size"),
        weights_bytes=stored + buffers_bytes(family, text, itemsize),
        kv_itemsize=itemsize,
        max_positions=text.number("max_position_embeddings", 0),
        mlp_peak_elements=_mlp_peak_elements(family, text),
        embedding_bytes=matrix_bytes,
        output_bytes=0 if text.flag("tie_word_embeddings") else matrix_bytes,
        splits_heads=family.splits_heads,
    )


def _stored_bytes(
    text: TextConfig, count: ParameterCount, itemsize: int, folder: Path | None
) -> int:
    """Return the bytes of the weights; of quantised ones as their files say where they are here."""
    settings, found = text.section("quantization_config"), None
    if folder is not None and settings and settings.get("quant_method") not in UNPACKED:
        found = checkpoint_bytes(folder, itemsize, tied=text.flag("tie_word_embeddings"))
    return stored_bytes(count, itemsize, settings, text.name) if found is None else found


def _itemsize(text: TextConfig, dtype: str | None) -> int:
    given = dtype or str(text.get("dtype") or text.get("torch_dtype") or _DEFAULT_DTYPE)
    itemsize = _ITEMSIZES.get(given)
    if itemsize is None:
        raise ModelLoadError(
            f"the config of {text.name!r} names dtype {given!r}, not one of {', '.join(_ITEMSIZES)}"
        )
    return itemsize


def _layers(family: Family, text: TextConfig) -> tuple[LayerShape, ...]:
    head_dim = text.head_dim
    layers = []
    for layer_type in family.layer_types(text):
        if layer_type == LINEAR:
            layers.append(LayerShape(kind=LayerKind.STATE))
            continue
        full = layer_type == FULL
        layers.append(
            LayerShape(
                kind=LayerKind.FULL if full else LayerKind.SLIDING,
                kv_heads=text.kv_heads,
                key_dim=head_dim,
                value_dim=head_dim,
                window_tokens=0 if full else text.size("sliding_window"),
            )
        )
    return tuple(layers)


def _mlp_width(text: TextConfig) -> int:
    """Return the widest MLP one token passes: a dense one, or all its experts."""
    dense = text.size("intermediate_size")
    experts = text.number("num_experts_per_tok", 0)
    shared = text.number("shared_expert_intermediate_size", 0)
    width = text.number("moe_intermediate_size", 0) or dense
    return max(dense, experts * width + shared) if experts else dense


def _mlp_peak_elements(family: Family, text: TextConfig) -> int:
    """Return what `ModelShape.mlp_peak_elements` says."""
    experts = text.number("num_experts_per_tok", 0)
    if not (family.fused_gate or (family.experts and experts)):
        return 0
    biased = family.experts is not None and family.experts.bias
    return fused_mlp_elements(
        _mlp_width(text), gathered=experts * text.size("hidden_size"), biased=biased
    )
