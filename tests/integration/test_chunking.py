"""Prompts in chunks: as a whole pass of stock, or not in chunks, planned for and said."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from transformers import DynamicCache, PreTrainedModel

import headinfer
from headinfer.errors import MemoryPlanError, UnsupportedModelError
from headinfer.integration.calls import cache_argument
from tiny_models import random_tokens, shared_model, tiny_model

PROMPT = 60
CHUNK = 13
TOLERANCE = 5e-6

_COMMON: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}
_MAMBA: dict[str, Any] = {
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_d_state": 16,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 16,
}
_DELTA: dict[str, Any] = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "head_dim": 16,
    "layer_types": ["linear_attention", "full_attention"] * 2,
}
_CONVOLUTIONS = {"layer_types": ["conv", "full_attention"] * 2}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}

# name: (causal model class, config class, what differs from _COMMON)
CONTINUING: dict[str, tuple[str, str, dict[str, Any]]] = {
    "bamba": ("BambaForCausalLM", "BambaConfig", {**_MAMBA, "attn_layer_indices": [1, 3]}),
    "granite-hybrid": (
        "GraniteMoeHybridForCausalLM",
        "GraniteMoeHybridConfig",
        {
            **_MAMBA,
            "layer_types": ["mamba", "attention"] * 2,
            "num_local_experts": 0,
            "shared_intermediate_size": 64,
            "position_embedding_type": "rope",
        },
    ),
    "lfm2": ("Lfm2ForCausalLM", "Lfm2Config", _CONVOLUTIONS),
    "lfm2-moe": ("Lfm2MoeForCausalLM", "Lfm2MoeConfig", {**_CONVOLUTIONS, **_EXPERTS}),
    "nemotron-h": (
        "NemotronHForCausalLM",
        "NemotronHConfig",
        {
            "layers_block_type": ["mamba", "attention", "mlp", "mamba"],
            "mamba_num_heads": 8,
            "mamba_head_dim": 16,
            "ssm_state_size": 16,
            "n_groups": 1,
            "chunk_size": 16,
            "head_dim": 16,
        },
    ),
    "olmo-hybrid": ("OlmoHybridForCausalLM", "OlmoHybridConfig", _DELTA),
    "qwen3.5": ("Qwen3_5ForCausalLM", "Qwen3_5TextConfig", _DELTA),
}
JAMBA = (
    "JambaForCausalLM",
    "JambaConfig",
    {
        "attn_layer_offset": 1,
        "attn_layer_period": 2,
        "expert_layer_offset": 1,
        "expert_layer_period": 2,
        "num_experts": 2,
        "mamba_d_state": 8,
        "use_mamba_kernels": False,
        "initializer_range": 0.2,
    },
)


def build(model_class: str, config_class: str, differences: dict[str, Any]) -> PreTrainedModel:
    """Return a tiny model in which every layer counts."""
    if not hasattr(transformers, model_class):
        pytest.skip(f"this transformers has no {model_class}")
    config = getattr(transformers, config_class)(**{**_COMMON, **differences})
    torch.manual_seed(0)
    model = getattr(transformers, model_class)(config).eval().requires_grad_(False)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(3.0)
    model.set_attn_implementation("eager")
    model.generation_config.eos_token_id = None
    return model


def padded() -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and mask of two rows, one padded for more than two chunks."""
    tokens = random_tokens(2, PROMPT)
    mask = torch.ones_like(tokens)
    mask[0, : 2 * CHUNK + 5] = 0
    return tokens, mask


def error_of(
    model: PreTrainedModel, run: Callable[[Any], torch.Tensor], **options: Any
) -> tuple[float, int]:
    """Compare what a run with our cache and with stock's returns; tell the widest pass of ours."""
    widths: list[int] = []
    stock = run(DynamicCache(config=model.config))
    handle = model.get_input_embeddings().register_forward_hook(
        lambda _module, inputs, _output: widths.append(inputs[0].shape[1])
    )
    try:
        with headinfer.attach(model, **{"chunk_tokens": CHUNK, **options}) as offload:
            ours = run(offload.new_cache())
    finally:
        handle.remove()
    return ((ours - stock).abs().max() / stock.abs().max()).item(), max(widths)


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Return what we logged, and not transformers."""
    ours = [record for record in caplog.records if record.name.startswith("headinfer")]
    return [record.getMessage() for record in ours]


@pytest.mark.covering
@pytest.mark.parametrize("given", ["nothing", "mask", "positions"])
@pytest.mark.parametrize("name", CONTINUING)
def test_a_state_goes_on_from_chunk_to_chunk(name: str, given: str) -> None:
    model = build(*CONTINUING[name])
    tokens, mask = padded()
    arguments = {} if given == "nothing" else {"attention_mask": mask}
    if given == "positions":
        arguments["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
    seen = torch.ones_like(mask) if given == "nothing" else mask

    def run(cache: Any) -> torch.Tensor:
        logits = model(tokens, **cache_argument(model, cache), **arguments).logits
        return logits[seen.bool()]

    error, widest = error_of(model, run)
    assert error < TOLERANCE
    assert widest == CHUNK


@pytest.mark.parametrize("device", ["cpu", "simulated"])
def test_a_state_that_does_not_go_on_passes_whole_and_is_said_once(
    device: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = build(*JAMBA)
    turns = [random_tokens(1, length, seed=length) for length in (PROMPT, 1, 29)]

    def converse(cache: Any) -> torch.Tensor:
        parts = [model(turn, **cache_argument(model, cache)).logits for turn in turns]
        return torch.cat(parts, dim=1)

    error, widest = error_of(model, converse, device=device)
    assert error < TOLERANCE
    assert widest == PROMPT
    warnings = said(caplog)
    assert len(warnings) == 1
    assert "JambaForCausalLM takes 60 tokens at once, not in chunks of 13" in warnings[0]
    assert "recurrent state" in warnings[0]


@pytest.mark.parametrize("given", ["nothing", "positions"])
def test_a_second_turn_begins_where_stock_begins_it(given: str) -> None:
    """Without positions that is at 0 again, for Bamba."""
    model = build(*CONTINUING["bamba"])
    turns = random_tokens(1, 2 * PROMPT).split(PROMPT, dim=1)

    def converse(cache: Any) -> torch.Tensor:
        parts = []
        for number, turn in enumerate(turns):
            positions = torch.arange(PROMPT).unsqueeze(0) + number * PROMPT
            arguments = {"position_ids": positions} if given == "positions" else {}
            parts.append(model(turn, **cache_argument(model, cache), **arguments).logits)
        return torch.cat(parts, dim=1)

    error, widest = error_of(model, converse)
    assert error < TOLERANCE
    assert widest == CHUNK


@pytest.mark.parametrize(
    ("model_class", "config_class", "differences", "reason"),
    [
        (
            "MiniMaxForCausalLM",
            "MiniMaxConfig",
            {"layer_types": _DELTA["layer_types"], "num_local_experts": 2},
            "in a cache of its own kind, with get_linear_cache",
        ),
        (
            "RecurrentGemmaForCausalLM",
            "RecurrentGemmaConfig",
            {},
            "in the model itself|attention registry",  # before its attention went through it
        ),
    ],
)
def test_a_past_that_is_kept_elsewhere_is_refused(
    model_class: str, config_class: str, differences: dict[str, Any], reason: str
) -> None:
    model = build(model_class, config_class, differences)
    with pytest.raises(UnsupportedModelError, match=reason):
        headinfer.attach(model)


def test_positions_that_are_counted_by_the_call_are_those_of_the_whole(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = build(
        "RobertaForCausalLM", "RobertaConfig", {"is_decoder": True, "num_key_value_heads": 4}
    )
    tokens, mask = padded()
    tokens = tokens.masked_fill(mask == 0, model.config.pad_token_id)
    wanted = model(tokens, attention_mask=mask, use_cache=False).logits
    with headinfer.attach(model, chunk_tokens=CHUNK) as offload:
        cache = cache_argument(model, offload.new_cache())
        ours = model(tokens, attention_mask=mask, **cache).logits
    seen = mask.bool()
    torch.testing.assert_close(ours[seen], wanted[seen], rtol=1e-4, atol=1e-4)
    assert any("no position_ids" in text for text in said(caplog))


def test_results_of_windows_can_be_viewed() -> None:
    """AFMoE views what attention returns, so it must be contiguous."""
    model = build(
        "AfmoeForCausalLM",
        "AfmoeConfig",
        {
            "head_dim": 16,
            "sliding_window": 8,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "num_dense_layers": 1,
            "moe_intermediate_size": 32,
        },
    )
    tokens, mask = padded()
    arguments = {"attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}

    def run(cache: Any) -> torch.Tensor:
        return model(tokens, **cache_argument(model, cache), **arguments).logits[mask.bool()]

    error, widest = error_of(model, run)
    assert error < TOLERANCE
    assert widest == CHUNK


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"output_hidden_states": True}, "output_hidden_states"),
        ({"logits_to_keep": torch.arange(3)}, "logits_to_keep"),
        ({"return_dict": False}, "return_dict"),
    ],
)
def test_an_argument_that_forbids_chunks_is_named(
    arguments: dict[str, Any], name: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = shared_model("llama3")
    tokens = random_tokens(1, PROMPT)
    with headinfer.attach(model, chunk_tokens=CHUNK) as offload:
        for _ in range(2):
            cache = offload.new_cache()
            model(tokens, **cache_argument(model, cache), **arguments)
    assert [warning.split(": ")[1] for warning in said(caplog)] == [f"it was given {name}"]


def test_a_whole_prompt_is_planned_for() -> None:
    model = tiny_model("llama3")
    tokens, following = random_tokens(1, 300), random_tokens(1, 3)
    options = {"device": "simulated", "chunk_tokens": 16, "tile_heads": 1, "tile_tokens": 64}
    stock = DynamicCache(config=model.config)
    model(tokens, **cache_argument(model, stock))
    wanted = model(following, **cache_argument(model, stock)).logits
    with headinfer.attach(model, **options) as offload:
        chunked = offload.plan
    at_once = chunked.activation_bytes * 290 // 16 - chunked.activation_bytes
    budget = chunked.total_device_bytes + at_once + chunked.shape.kv_bytes(200)
    with headinfer.attach(model, device_memory=budget, **options) as offload:
        cache = offload.new_cache(max_tokens=400)
        model(tokens[:, :10], **cache_argument(model, cache))
        before = cache.state.engine.plan
        call = {**cache_argument(model, cache), "output_hidden_states": True, "logits_to_keep": 1}
        model(tokens[:, 10:], **call)
        plan = cache.state.engine.plan
        assert plan.whole_tokens == 290
        assert plan.activation_bytes > 10 * before.activation_bytes
        assert plan.total_device_bytes <= budget
        assert "up to 290 tokens that cannot pass in chunks" in str(plan)
        assert 0 < plan.resident_tokens < before.resident_tokens  # given up for it
        ours = model(following, **cache_argument(model, cache)).logits
    torch.testing.assert_close(ours, wanted)


def test_a_whole_prompt_that_does_not_fit_is_refused() -> None:
    model = build(*JAMBA)
    options = {"device": "simulated", "chunk_tokens": 16, "tile_heads": 1, "tile_tokens": 64}
    with headinfer.attach(model, **options) as offload:
        budget = offload.plan.total_device_bytes + 4 * offload.plan.activation_bytes
    with headinfer.attach(model, device_memory=budget, **options) as offload:
        refused, cache = offload.new_cache(), offload.new_cache()
        with pytest.raises(MemoryPlanError) as refusal:
            model(random_tokens(1, 300), **cache_argument(model, refused))
        assert refused.get_seq_length() == 0
        model(random_tokens(1, 40), **cache_argument(model, cache))  # fits as a whole
    message = str(refusal.value)
    assert "\n" not in message
    assert "does not hold 300 tokens at once, which need" in message
    assert "JambaForCausalLM takes no chunks: its recurrent state" in message
