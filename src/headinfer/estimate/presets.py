"""Models known by name: the paper's and current ones, as the configs their makers published.

Only the keys that determine the shape are kept. Mistral-7B is version 0.2, the first without a
sliding window, and Qwen2-7B the base model. gpt-oss-20b's experts are in MXFP4, as published.
"""

from collections.abc import Mapping

from headinfer.errors import OptionError
from headinfer.estimate.config import shape_from_config
from headinfer.plan.shape import ModelShape

_LLAMA_3_8B = {
    "model_type": "llama",
    "dtype": "bfloat16",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
}

PRESETS: dict[str, Mapping[str, object]] = {
    "llama-3-8b": _LLAMA_3_8B,
    "llama-2-7b": {
        "model_type": "llama",
        "dtype": "float16",
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "max_position_embeddings": 4096,
    },
    "mistral-7b": {
        "model_type": "mistral",
        "dtype": "bfloat16",
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 32768,
        "sliding_window": None,
    },
    "qwen2-7b": {
        "model_type": "qwen2",
        "dtype": "bfloat16",
        "vocab_size": 152064,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "max_position_embeddings": 131072,
        "use_sliding_window": False,
    },
    "gemma-2-9b": {
        "model_type": "gemma2",
        "dtype": "bfloat16",
        "vocab_size": 256000,
        "hidden_size": 3584,
        "intermediate_size": 14336,
        "num_hidden_layers": 42,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 256,
        "max_position_embeddings": 8192,
        "sliding_window": 4096,
    },
    "llama-3-70b": _LLAMA_3_8B
    | {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
    },
    "llama-3.1-8b": _LLAMA_3_8B | {"max_position_embeddings": 131072},
    "llama-3.2-1b": _LLAMA_3_8B
    | {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "head_dim": 64,
        "max_position_embeddings": 131072,
        "tie_word_embeddings": True,
    },
    "qwen3-8b": {
        "model_type": "qwen3",
        "dtype": "bfloat16",
        "vocab_size": 151936,
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 40960,
        "use_sliding_window": False,
    },
    "qwen3-30b-a3b": {
        "model_type": "qwen3_moe",
        "dtype": "bfloat16",
        "vocab_size": 151936,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_hidden_layers": 48,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
        "max_position_embeddings": 40960,
        "use_sliding_window": False,
    },
    "gemma-3-27b": {
        "model_type": "gemma3",
        "dtype": "bfloat16",
        "text_config": {
            "hidden_size": 5376,
            "intermediate_size": 21504,
            "num_hidden_layers": 62,
            "num_attention_heads": 32,
            "num_key_value_heads": 16,
            "head_dim": 128,
            "sliding_window": 1024,
        },
    },
    "gpt-oss-20b": {
        "model_type": "gpt_oss",
        "dtype": "bfloat16",
        "vocab_size": 201088,
        "hidden_size": 2880,
        "intermediate_size": 2880,
        "num_hidden_layers": 24,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "num_local_experts": 32,
        "num_experts_per_tok": 4,
        "max_position_embeddings": 131072,
        "sliding_window": 128,
        "quantization_config": {"quant_method": "mxfp4"},
    },
    "phi-4": {
        "model_type": "phi3",
        "dtype": "bfloat16",
        "vocab_size": 100352,
        "hidden_size": 5120,
        "intermediate_size": 17920,
        "num_hidden_layers": 40,
        "num_attention_heads": 40,
        "num_key_value_heads": 10,
        "max_position_embeddings": 16384,
    },
}
"""The models known by name, the paper's first."""


def preset_shape(name: str, *, dtype: str | None = None) -> ModelShape:
    """Return the shape of a model known by name.

    Args:
        name: a key of `PRESETS`.
        dtype: as for `shape_from_config`.

    Raises:
        OptionError: there is none of that name, or no such dtype.
    """
    if name not in PRESETS:
        raise OptionError(f"model preset {name!r} is not known; use one of {', '.join(PRESETS)}")
    return shape_from_config(PRESETS[name], name=name, dtype=dtype)
