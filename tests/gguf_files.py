"""GGUF files of tiny models, written by the package `gguf` as by the converter of llama.cpp."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM
from transformers.convert_slow_tokenizer import bytes_to_unicode

gguf = pytest.importorskip("gguf", reason="GGUF files are written with the package gguf")

CONTROL, NORMAL = 3, 1
CHAT = "{% for message in messages %}[{{ message['content'] }}]{% endfor %}"
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "initializer_range": 0.3,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def tiny_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        **SIZES,
        num_hidden_layers=2,
        vocab_size=len(_byte_level()[0]),
        rope_theta=5000.0,
        max_position_embeddings=384,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config).eval()


def tiny_gemma() -> Gemma3ForCausalLM:
    """Seven layers, of which one sees all tokens, and norms away from 1."""
    torch.manual_seed(0)
    config = Gemma3TextConfig(
        **SIZES,
        num_hidden_layers=7,
        vocab_size=len(_sentencepiece()),
        sliding_window=8,
        query_pre_attn_scalar=16,
        max_position_embeddings=384,
    )
    model = Gemma3ForCausalLM(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight.uniform_(-0.5, 0.5)
    return model


def write_llama(path: Path, *, add_bos: bool = False, **extra: Any) -> LlamaForCausalLM:
    """Write a GGUF file of `tiny_llama`, and return the model."""
    model = tiny_llama()
    writer = _writer(path, "llama", model.config)
    tokens, merges = _byte_level()
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([CONTROL] * 3 + [NORMAL] * (len(tokens) - 3))
    writer.add_token_merges(merges)
    writer.add_chat_template(CHAT)
    _end(writer, model, gguf.MODEL_ARCH.LLAMA, add_bos, extra)
    return model


def write_gemma(path: Path, *, add_bos: bool = True) -> Gemma3ForCausalLM:
    """Write a GGUF file of `tiny_gemma`, and return the model."""
    model = tiny_gemma()
    writer = _writer(path, "gemma3", model.config)
    writer.add_sliding_window(model.config.sliding_window)
    writer.add_key_length(model.config.head_dim)
    writer.add_value_length(model.config.head_dim)
    tokens = _sentencepiece()
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([-1000.0] * len(tokens))
    writer.add_token_types([CONTROL] * 4 + [NORMAL] * (len(tokens) - 4))
    _end(writer, model, gguf.MODEL_ARCH.GEMMA3, add_bos, {})
    return model


def _writer(path: Path, arch: str, config: Any) -> Any:
    writer = gguf.GGUFWriter(path, arch)
    rope = config.rope_parameters
    writer.add_name("tiny")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(rope.get("full_attention", rope)["rope_theta"])
    return writer


def _end(writer: Any, model: Any, arch: Any, add_bos: bool, extra: dict[str, Any]) -> None:
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    writer.add_add_bos_token(add_bos)
    for key, value in extra.items():
        writer.add_uint32(key.replace("__", "."), value)
    config = model.config
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        stored = weight
        if arch == gguf.MODEL_ARCH.LLAMA and name.endswith(("q_proj.weight", "k_proj.weight")):
            stored = _interleaved(weight, config.head_dim)
        if arch == gguf.MODEL_ARCH.GEMMA3 and "norm" in name:
            stored = weight + 1
        stem = names.get_name(name.removesuffix(".weight"))
        writer.add_tensor(f"{stem}.weight", stored.numpy().copy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _interleaved(weight: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Put the two halves that rotary embeddings turn side by side, as llama.cpp wants them."""
    halves = weight.reshape(-1, 2, head_dim // 2, weight.shape[1])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def _byte_level() -> tuple[list[str], list[str]]:
    """Return the tokens and merges of a byte-level vocabulary."""
    merges = ["h e", "l l", "he ll"]
    tokens = ["<pad>", "<s>", "</s>", *bytes_to_unicode().values()]
    return tokens + [merge.replace(" ", "") for merge in merges], merges


def _sentencepiece() -> list[str]:
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    return ["<pad>", "<bos>", "<eos>", "<unk>", "\u2581", *letters, "he", "ll", "hell", "hello"]
