"""A shape told from a config is the shape of the model that transformers makes of it."""

import json

import pytest
import torch
import transformers

from headinfer.errors import HeadInferError, ModelLoadError, OptionError, UnsupportedModelError
from headinfer.estimate.config import shape_from_config
from headinfer.estimate.presets import PRESETS
from headinfer.integration.model_shape import model_shape
from headinfer.plan.shape import LayerKind
from tiny_models import ARCHITECTURES, shared_model, tiny_model

LLAMA = PRESETS["llama-3-8b"]
DERIVED = {"layer_types": None}
WINDOWS = {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 1}


def shape_of_config(values, model, dtype="float32"):
    return shape_from_config(values, name=type(model).__name__, dtype=dtype)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_family(name: str) -> None:
    model = shared_model(name)
    assert shape_of_config(model.config.to_dict(), model) == model_shape(model)


VARIANTS = {
    "biases": ("llama3", {"attention_bias": True, "mlp_bias": True}),
    "tied": ("llama3", {"tie_word_embeddings": True}),
    "head_dim null": ("llama2", {"head_dim": None, "num_key_value_heads": None}),
    "qwen2, windows in later layers": ("qwen2", DERIVED | WINDOWS),
    "qwen3, windows in later layers": ("qwen3", DERIVED | WINDOWS | {"attention_bias": True}),
    "qwen3-moe, windows": ("qwen3-moe", WINDOWS),
    "qwen3-moe, a dense layer": ("qwen3-moe", {"mlp_only_layers": [1]}),
    "qwen3-moe, every second layer dense": ("qwen3-moe", {"decoder_sparse_step": 2}),
    "gemma2, derived layers": ("gemma2", DERIVED),
    "gemma3, derived layers": ("gemma3", DERIVED | {"num_hidden_layers": 7}),
    "gemma3, pattern": ("gemma3", DERIVED | {"sliding_window_pattern": 2}),
    "gemma3, untied": ("gemma3", {"tie_word_embeddings": False}),
    "gpt-oss, derived layers": ("gpt-oss", DERIVED),
    "gpt-oss, no biases": ("gpt-oss", {"attention_bias": False}),
    "qwen3-next, derived layers": ("qwen3-next", DERIVED | {"num_hidden_layers": 5}),
    "qwen3-next, interval": ("qwen3-next", DERIVED | {"full_attention_interval": 2}),
    "phi3, window": ("phi3", {"sliding_window": 24}),
    "phi3, heads rotated in part": (
        "phi3",
        {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
    ),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_what_a_config_can_change(name: str) -> None:
    architecture, changes = VARIANTS[name]
    model = tiny_model(architecture, **changes)
    # As published, not as transformers fills it in.
    values = model.config.to_dict() | changes
    assert shape_of_config(values, model) == model_shape(model)


@pytest.mark.parametrize("changes", [{}, WINDOWS | {"max_window_layers": 2}, {"qkv_bias": False}])
def test_qwen2_moe(changes) -> None:
    config = transformers.Qwen2MoeConfig(
        vocab_size=97,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=8,
        num_key_value_heads=2,
        num_experts=4,
        moe_intermediate_size=32,
        shared_expert_intermediate_size=48,
        **changes,
    )
    model = transformers.Qwen2MoeForCausalLM(config)
    values = config.to_dict() | DERIVED
    assert shape_of_config(values, model) == model_shape(model)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_saved_model_has_the_dtype_its_config_names(dtype, tmp_path) -> None:
    """Rotary frequencies stay in float32, as loaded."""
    tiny_model("gemma3").to(getattr(torch, dtype)).save_pretrained(tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    values = json.loads((tmp_path / "config.json").read_text())
    assert shape_of_config(values, model, dtype=None) == model_shape(model)


def test_the_text_part_of_a_model_that_sees() -> None:
    text = shared_model("gemma3")
    inside = text.config.to_dict() | {"dtype": None}
    for key in ("dtype", "torch_dtype"):
        values = {"model_type": "gemma3", key: "float32", "text_config": inside}
        assert shape_of_config(values, text, dtype=None) == model_shape(text)


def test_a_config_without_dtype_is_taken_as_bfloat16() -> None:
    values = {key: value for key, value in LLAMA.items() if key != "dtype"}
    assert shape_from_config(values, name="x") == shape_from_config(LLAMA, name="x")


# Bytes of one element of the layers' matrices, its share of the scales included.
QUANTISED = {
    "bitsandbytes 4-bit": ({"quant_method": "bitsandbytes", "load_in_4bit": True}, 4.5 / 8),
    "bitsandbytes 8-bit": ({"quant_method": "bitsandbytes", "load_in_8bit": True}, 1),
    "double": (
        {
            "quant_method": "bitsandbytes",
            "load_in_4bit": True,
            "bnb_4bit_use_double_quant": True,
        },
        (4 + 8.125 / 64) / 8,
    ),
    "gptq": ({"quant_method": "gptq", "bits": 4, "group_size": 128}, (4 + 20 / 128) / 8),
    "gptq without groups": ({"quant_method": "gptq", "bits": 8, "group_size": -1}, 1),
    "awq": ({"quant_method": "awq", "bits": 4, "group_size": 64}, (4 + 20 / 64) / 8),
    "fp8": ({"quant_method": "fp8"}, (8 + 1 / 512) / 8),
}


@pytest.mark.parametrize("name", QUANTISED)
def test_quantised_weights_take_their_stored_size(name: str) -> None:
    settings, element_bytes = QUANTISED[name]
    plain = shape_from_config(LLAMA, name="x")
    quantised = shape_from_config({**LLAMA, "quantization_config": settings}, name="x")
    matrices = 32 * (4096 * 4096 * 2 + 4096 * 1024 * 2 + 3 * 4096 * 14336)
    saved = round(matrices * (2 - element_bytes))
    assert plain.weights_bytes - quantised.weights_bytes == saved
    assert quantised.kv_itemsize == 2


def without(*keys: str) -> dict[str, object]:
    return {key: value for key, value in LLAMA.items() if key not in keys}


MISTAKES = {
    "not a mapping": (["llama"], ModelLoadError, "has no model_type", "tiny"),
    "no type": (without("model_type"), ModelLoadError, "has no model_type"),
    "unknown type": (
        {**LLAMA, "model_type": "rwkv"},
        UnsupportedModelError,
        "'rwkv'",
        "llama, mistral",
    ),
    "missing": (without("hidden_size"), ModelLoadError, "no hidden_size"),
    "words": ({**LLAMA, "vocab_size": "many"}, ModelLoadError, "vocab_size", "'many'"),
    "fraction": ({**LLAMA, "hidden_size": 4096.5}, ModelLoadError, "hidden_size", "4096.5"),
    "true": ({**LLAMA, "hidden_size": True}, ModelLoadError, "hidden_size", "True"),
    "no layers": ({**LLAMA, "num_hidden_layers": 0}, ModelLoadError, "num_hidden_layers"),
    "negative": ({**LLAMA, "head_dim": -1}, ModelLoadError, "head_dim", "-1"),
    "more heads than elements": ({**LLAMA, "num_attention_heads": 8192}, ModelLoadError),
    "odd heads": (
        {**LLAMA, "num_key_value_heads": 5},
        ModelLoadError,
        "num_key_value_heads",
        "divisor of 32",
    ),
    "too few layer types": (
        {**LLAMA, "layer_types": ["full_attention"]},
        ModelLoadError,
        "1 layer_types for 32",
    ),
    "layer types in words": ({**LLAMA, "layer_types": "full"}, ModelLoadError, "a list"),
    "unknown layers": (
        {**LLAMA, "layer_types": ["chunked_attention"] * 32},
        UnsupportedModelError,
        "'chunked_attention'",
    ),
    "windows without a size": (
        {**LLAMA, "layer_types": ["sliding_attention"] * 32},
        ModelLoadError,
        "no sliding_window",
    ),
    "dtype": ({**LLAMA, "dtype": "int4"}, ModelLoadError, "'int4'", "bfloat16"),
    "quantisation": (
        {**LLAMA, "quantization_config": {"quant_method": "hqq"}},
        ModelLoadError,
        "'hqq'",
        "mxfp4",
    ),
    "no text": ({"model_type": "gemma3"}, ModelLoadError, "no text_config"),
    "text in words": ({"model_type": "gemma3", "text_config": "all"}, ModelLoadError, "a mapping"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_told_in_one_line(name: str) -> None:
    values, error, *words = MISTAKES[name]
    with pytest.raises(error) as raised:
        shape_from_config(values, name="tiny")
    assert isinstance(raised.value, HeadInferError)
    line = str(raised.value)
    assert "\n" not in line
    assert all(word in line for word in ("tiny", *words))


def test_an_unknown_dtype_is_refused_whatever_the_model() -> None:
    with pytest.raises(OptionError, match="'int4'"):
        shape_from_config({"model_type": "rwkv"}, name="tiny", dtype="int4")


def test_a_layer_of_a_hybrid_model_has_no_cache() -> None:
    shape = shape_from_config(shared_model("qwen3-next").config.to_dict(), name="tiny")
    kinds = [layer.kind for layer in shape.layers]
    assert kinds == [LayerKind.STATE, LayerKind.FULL] * 2
