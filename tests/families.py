"""Tiny random models of any family that transformers has, made from the config class alone."""

from typing import Any

import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedModel

VOCAB = 128
TEXT_TOKENS = 96
"""Tokens below this are text; the special tokens of images and the like lie above."""

WINDOW = 12
"""Of sliding layers: far less than the prompts."""

LAYERS = 4
SHARPNESS = 3.0

_SMALL: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 2048,
    "rotary_dim": 8,
    "attention_dropout": 0.0,
    "is_decoder": True,
    "use_cache": True,
    # windows
    "sliding_window": WINDOW,
    "use_sliding_window": True,
    "max_window_layers": 2,
    # experts
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "num_experts_per_token": 2,
    "n_group": 2,
    "topk_group": 1,
    "num_expert_group": 2,
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    # compressed keys and values
    "kv_lora_rank": 16,
    "q_lora_rank": 24,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 12,
    # states
    "attn_layer_period": 2,
    "attn_layer_offset": 1,
    "use_mamba_kernels": False,
    "mamba_n_heads": 4,
    "mamba_d_head": 32,
    "mamba_n_groups": 1,
    "mamba_d_state": 8,
    "mamba_chunk_size": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_num_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_head_dim": 8,
    # images and sound
    "image_size": 28,
    "patch_size": 14,
    "depth": 2,
    "embed_dim": 32,
    "num_heads": 4,
    "d_model": 64,
    "encoder_layers": 2,
    "encoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_layers": LAYERS,
    "decoder_attention_heads": 4,
    "decoder_ffn_dim": 64,
    # tokens
    "bos_token_id": 1,
    "eos_token_id": None,
    "forced_eos_token_id": None,
    "pad_token_id": 0,
}

_MIXED = ("layer_types", "layers_block_type", "mlp_layer_types")
"""Fields with one kind for each layer, of which all kinds shall be there."""


def tiny_config(config_class: type[PreTrainedConfig], **changes: Any) -> PreTrainedConfig:
    """Return a config of small sizes.

    Args:
        config_class: its defaults tell which fields there are.
        **changes: fields that need other values; a dictionary for a config within it.
    """
    standard_names = {own: standard for standard, own in config_class.attribute_map.items()}
    values: dict[str, Any] = {}
    special = VOCAB
    defaults = vars(config_class())
    for name, value in defaults.items():
        standard = name if name in _SMALL else standard_names.get(name, name)
        if name in _MIXED and isinstance(value, list):
            if len(kinds := list(dict.fromkeys(value))) > 1:
                values[name] = [kinds[layer % len(kinds)] for layer in range(LAYERS)]
        elif isinstance(value, PreTrainedConfig):
            values[name] = tiny_config(type(value), **changes.get(name, {}))
        elif isinstance(value, (list, tuple)) or (
            standard == "head_dim" and "qk_head_dim" in defaults
        ):
            continue
        elif standard in _SMALL:
            values[name] = _SMALL[standard]
        elif name.endswith(("_token_id", "_token_index")) and isinstance(value, int):
            special -= 1
            values[name] = special
    changed = {
        name: value
        for name, value in changes.items()
        if not isinstance(value, dict) or name not in values
    }
    return config_class(**{**values, **changed})


def tiny_family(name: str, *, seed: int = 0, device: str = "cpu") -> PreTrainedModel:
    """Return a new tiny model of a class of transformers, in eval mode, whose attention matters."""
    model_class = getattr(transformers, name)
    config = tiny_config(model_class.config_class, **CHANGES.get(name, {}))
    torch.manual_seed(seed)
    with torch.device(device):
        model = model_class(config).eval()
    model.requires_grad_(False)
    model.set_attn_implementation("eager")
    _sharpen(model)
    return model


def _sharpen(model: torch.nn.Module) -> None:
    """Enlarge all matrices but embeddings: as initialised, attention barely matters."""
    apart = {
        id(module.weight) for module in model.modules() if isinstance(module, torch.nn.Embedding)
    }
    for parameter in model.parameters():
        if parameter.ndim > 1 and id(parameter) not in apart:
            parameter.mul_(SHARPNESS)


def _rope(**changes: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, **changes}}


_THREE_AXES = _rope(mrope_section=[2, 3, 3])
_VISION = {"out_hidden_size": 64}
_TWO_ROPES = {
    "rope_parameters": {
        kind: {"rope_type": "default", "rope_theta": 10000.0}
        for kind in ("full_attention", "sliding_attention")
    }
}
_INDEXER = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": 16,
    "indexer_compress_ratio": 4,
}
_IMAGE_CODES = {"vocabulary_map": {"<image>": 120}, "image_token_id": 121}

CHANGES: dict[str, dict[str, Any]] = {
    "BambaForCausalLM": {"attn_layer_indices": [1, 3]},
    "ChameleonForConditionalGeneration": _IMAGE_CODES,
    "CohereCompassForCausalLM": _TWO_ROPES,
    "CohereCompassForConditionalGeneration": {"text_config": _TWO_ROPES},
    "Cosmos3EdgeForConditionalGeneration": {"text_config": _THREE_AXES},
    "Cosmos3OmniForConditionalGeneration": {"text_config": _THREE_AXES, "vision_config": _VISION},
    "DbrxForCausalLM": {"attn_config": {"rope_theta": 10000.0, "clip_qkv": 8.0}},
    "DeepseekOcr2ForConditionalGeneration": {
        "text_config": {"mlp_layer_types": ["dense", "sparse"] * 2}
    },
    "DoryForCausalLM": {"n_input_layers": 1, "n_recurrent_layers": 2, "n_output_layers": 1},
    "Dots1ForCausalLM": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "Dots3NoteForCausalLM": {"num_key_value_heads": 4},
    "Dots3NoteForConditionalGeneration": {"text_config": {"num_key_value_heads": 4}},
    "Emu3ForConditionalGeneration": {"vocabulary_map": {"<image>": 120}},
    "Ernie4_5_VLMoeForConditionalGeneration": {
        "text_config": {
            "moe_intermediate_size": [32, 32],
            "moe_num_experts": 4,
            "moe_k": 2,
            **_rope(mrope_section=[3, 3, 2]),
        }
    },
    "FalconH1ForCausalLM": {"mamba_d_ssm": 128},
    "FunAsrNanoForConditionalGeneration": {"adaptor_config": {"intermediate_size": 16}},
    "GPTNeoForCausalLM": {
        "attention_types": [[["global", "local"], 2]],
        "num_layers": 4,
        "window_size": 12,
    },
    "Gemma3nForCausalLM": {
        "num_kv_shared_layers": 2,
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": VOCAB,
        "intermediate_size": [96] * LAYERS,
        "activation_sparsity_pattern": [0.0] * LAYERS,
        "laurel_rank": 8,
    },
    "Glm46VForConditionalGeneration": {"text_config": _THREE_AXES},
    "Glm4vForConditionalGeneration": {"text_config": _THREE_AXES},
    "GlmOcrForConditionalGeneration": {"text_config": _THREE_AXES},
    "Glm4vMoeForConditionalGeneration": {
        "text_config": _rope(mrope_section=[2, 1, 1], partial_rotary_factor=0.5)
    },
    "Glm5NextForConditionalGeneration": {
        "text_config": {"num_key_value_heads": 4, "qk_rope_head_dim": 0}
    },
    "Granite4VisionForConditionalGeneration": {
        "deepstack_layer_map": [[-1, 0]],
        "downsample_rate": "1/2",
        "spatial_target_layers": [1],
    },
    "GraniteDoclingForConditionalGeneration": {"vision_config": _VISION},
    "GraniteMoeHybridForCausalLM": {"layer_types": ["linear_attention", "full_attention"] * 2},
    "HYV4VLForConditionalGeneration": {"text_config": _rope(mrope_section=[2, 1, 1])},
    "HunYuanDenseV1ForCausalLM": _rope(alpha=1000.0),
    "HunYuanVLForConditionalGeneration": {
        "text_config": _rope(alpha=1000.0, mrope_section=[2, 2, 2, 2])
    },
    "Inkling2ForConditionalGeneration": {"vision_config": {"text_hidden_size": 64}},
    "Inkling2LoopForConditionalGeneration": {"vision_config": {"text_hidden_size": 64}},
    "KyutaiSpeechToTextForConditionalGeneration": {"codec_config": {"upsample_groups": 64}},
    "Lfm2MoeForCausalLM": {"layer_types": ["conv", "full_attention"] * 2},
    "Mamba2ForCausalLM": {"num_heads": 8},
    "Molmo2ForConditionalGeneration": {
        "adapter_config": {"vision_feature_layer": [2, 1], "text_hidden_size": 64}
    },
    "MuseSparkForConditionalGeneration": {"audio_config": _VISION},
    "PaddleOCRVLForConditionalGeneration": {"text_config": _THREE_AXES},
    "Qwen2VLForConditionalGeneration": {"text_config": _THREE_AXES},
    "Qwen2_5_VLForConditionalGeneration": {"text_config": _THREE_AXES},
    "Qwen2_5OmniThinkerForConditionalGeneration": {
        "text_config": _THREE_AXES,
        "vision_start_token_id": 97,
    },
    "Qwen3OmniMoeThinkerForConditionalGeneration": {
        "text_config": {"sliding_window": None, **_THREE_AXES},  # no mask of theirs has one
        "vision_start_token_id": 97,
    },
    "Qwen3VLForConditionalGeneration": {"text_config": _THREE_AXES},
    "Qwen3VLMoeForConditionalGeneration": {"text_config": {"sliding_window": None, **_THREE_AXES}},
    "Qwen3ASRForConditionalGeneration": {"eos_token_id": [127]},
    "Qwen4ExpForCausalLM": _INDEXER,
    "Qwen4ExpForConditionalGeneration": {"text_config": _INDEXER},
    "ReformerModelWithLMHead": {"axial_pos_embds_dim": [32, 32]},
    "Step3p7ForConditionalGeneration": {"text_config": {"num_sliding_attention_heads": 4}},
    "XmodForCausalLM": {"default_language": "en_XX"},
    "ZayaForCausalLM": {"num_experts_per_tok": 1},
}
