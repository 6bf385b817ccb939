"""Tiny random models of the real architectures, as transformers makes them."""

import functools
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

VOCAB = 97

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}
_EXPERTS: dict[str, Any] = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
}
_HYBRID: dict[str, Any] = {
    "num_hidden_layers": 4,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "shared_expert_intermediate_size": 32,
    "layer_types": ["linear_attention", "full_attention"] * 2,
}

# name: (causal model class, config class, what differs from _COMMON)
ARCHITECTURES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama2": ("LlamaForCausalLM", "LlamaConfig", {"num_key_value_heads": 8}),
    "llama3": ("LlamaForCausalLM", "LlamaConfig", {"num_key_value_heads": 4, "head_dim": 16}),
    "mistral": ("MistralForCausalLM", "MistralConfig", {"sliding_window": None}),
    "mistral-sliding": ("MistralForCausalLM", "MistralConfig", {"sliding_window": 24}),
    "mixtral": (
        "MixtralForCausalLM",
        "MixtralConfig",
        {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
    ),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", {}),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", {"head_dim": 16}),
    "qwen3-moe": ("Qwen3MoeForCausalLM", "Qwen3MoeConfig", {"head_dim": 16, **_EXPERTS}),
    "gemma2": (
        "Gemma2ForCausalLM",
        "Gemma2Config",
        # Low caps and large scores, so that a cap ignored would show.
        {
            "head_dim": 256,
            "sliding_window": 24,
            "attn_logit_softcapping": 2.0,
            "query_pre_attn_scalar": 4,
        },
    ),
    "gemma3": (
        "Gemma3ForCausalLM",
        "Gemma3TextConfig",
        {
            "head_dim": 16,
            "sliding_window": 24,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    "phi3": ("Phi3ForCausalLM", "Phi3Config", {"sliding_window": None}),
    "qwen2-moe": (
        "Qwen2MoeForCausalLM",
        "Qwen2MoeConfig",
        {**_EXPERTS, "shared_expert_intermediate_size": 32},
    ),
    "qwen2-moe-sliding": (
        "Qwen2MoeForCausalLM",
        "Qwen2MoeConfig",
        {
            **_EXPERTS,
            "shared_expert_intermediate_size": 32,
            "sliding_window": 24,
            "use_sliding_window": True,
        },
    ),
    "gpt-oss": (
        "GptOssForCausalLM",
        "GptOssConfig",
        {
            "head_dim": 16,
            "sliding_window": 24,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "layer_types": ["sliding_attention", "full_attention", "full_attention"],
        },
    ),
    "qwen3-next": (
        "Qwen3NextForCausalLM",
        "Qwen3NextConfig",
        {"head_dim": 16, **_EXPERTS, **_HYBRID},
    ),
}

# Those with tests of their own, beside what every architecture is tested for.
_OTHERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "phimoe": (
        "PhimoeForCausalLM",
        "PhimoeConfig",
        {"num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "phimoe-sliding": (
        "PhimoeForCausalLM",
        "PhimoeConfig",
        {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 24},
    ),
}


def tiny_model(name: str, *, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """Return a new tiny model in eval mode, under stock eager attention."""
    model_class, config_class, differences = (ARCHITECTURES | _OTHERS)[name]
    config = getattr(transformers, config_class)(**{**_COMMON, **differences, **changes})
    torch.manual_seed(seed)
    model = getattr(transformers, model_class)(config).eval()
    # Default initialisation is so small that attention barely matters; make every layer count.
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(3.0)
            elif "sinks" in dict(model.named_parameters()):
                parameter.add_(0.1)
    model.set_attn_implementation("eager")
    model.generation_config.eos_token_id = None
    model.requires_grad_(False)
    return model


@functools.cache
def shared_model(name: str) -> PreTrainedModel:
    """Return a tiny model shared by tests that leave it as they found it."""
    return tiny_model(name)


def random_tokens(batch: int, length: int, *, seed: int = 1) -> torch.Tensor:
    """Return token ids `[batch, length]`."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, VOCAB, (batch, length), generator=generator)
