"""Drafts on a GPU: what they give, and that passes give the same bits; run with `pytest -m gpu`."""

from typing import Any

import pytest
import torch
from transformers import DynamicCache, PreTrainedModel

import headinfer
from headinfer.finding.attention import LayerCall, attending_by
from headinfer.integration.model_shape import model_shape
from headinfer.plan.memory import draft_sink_tokens
from headinfer.plan.shape import LayerKind
from tiny_models import random_tokens, tiny_model

pytestmark = pytest.mark.gpu

PROMPT_TOKENS, DRAFT_TOKENS, DRAFTS = 900, 200, 12
NOT_CAPTURED = {"gpt-oss"}
"""Outside of `generate` these choose their experts on the host, which no capture has."""

OPTIONS: dict[str, Any] = {
    "tile_heads": 1,
    "tile_tokens": 128,
    "chunk_tokens": 256,
    "draft_tokens": DRAFT_TOKENS,
}


def logits(model: PreTrainedModel, cache: Any, *tokens: int) -> torch.Tensor:
    given: torch.Tensor = model(
        torch.tensor([tokens], device=model.device), past_key_values=cache
    ).logits.clone()
    return given


def prompted(model: PreTrainedModel, cache: Any) -> Any:
    model(random_tokens(1, PROMPT_TOKENS).cuda(), past_key_values=cache)
    return cache


def drafted(model: PreTrainedModel, cache: Any) -> list[torch.Tensor]:
    with cache.drafting():
        return [logits(model, cache, 3 + at) for at in range(DRAFTS)]


def masked(model: PreTrainedModel) -> list[torch.Tensor]:
    """Return the logits of drafts by a stock model that sees what drafts attend, by a mask."""
    cache = prompted(model, DynamicCache(config=model.config))
    kinds = [layer.kind for layer in model_shape(model).layers]
    sinks = draft_sink_tokens(DRAFT_TOKENS)

    def attend(call: LayerCall) -> torch.Tensor:
        (rows,) = call.blocks
        seen = call.seen[..., rows, :]
        if kinds[call.layer] is LayerKind.FULL:
            positions = torch.arange(call.keys.shape[2], device=call.keys.device)
            newest = PROMPT_TOKENS - (DRAFT_TOKENS - sinks)
            seen = seen & ((positions < sinks) | (positions >= newest))
        return call.attended(call.weights(rows, seen))

    with attending_by(model, attend):
        return [logits(model, cache, 3 + at) for at in range(DRAFTS)]


@pytest.mark.parametrize("resident_tokens", [0, 300, "all"])
@pytest.mark.parametrize("name", ["llama3", "gemma3", "gpt-oss"])
def test_a_drafts_logits_are_those_of_a_masked_stock_model(
    name: str, resident_tokens: int | str
) -> None:
    model = tiny_model(name).cuda()
    wanted = torch.stack(masked(model))
    with headinfer.attach(model, **OPTIONS, resident_tokens=resident_tokens) as offload:
        cache = prompted(model, offload.new_cache())
        for _ in range(2):  # the second time by a capture that is there
            error = (torch.stack(drafted(model, cache)) - wanted).abs().max() / wanted.abs().max()
            assert error < 1e-4
        captured = name not in NOT_CAPTURED
        assert offload.stats.captures == captured
        assert (offload.stats.captured_drafts > DRAFTS) == captured


@pytest.mark.parametrize("resident_tokens", [0, 300, "all"])
@pytest.mark.parametrize("host_attention", ["off", 0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama3", "gemma3"])
def test_passes_give_the_same_bits_with_drafts_and_without(
    name: str, dtype: torch.dtype, host_attention: str | float, resident_tokens: int | str
) -> None:
    model, outputs = tiny_model(name).to("cuda", dtype), []
    options = {"resident_tokens": resident_tokens, "host_attention": host_attention}
    for drafts in (False, True):
        with headinfer.attach(model, **OPTIONS, **options) as offload:
            cache, ours = prompted(model, offload.new_cache()), []
            for accepted in (1, 3, 8, 1, 1, 1, 40, 70, 2):
                if drafts:
                    drafted(model, cache)
                ours.append(logits(model, cache, *range(5, 5 + accepted)))
            cache.crop(-60)
            if drafts:
                drafted(model, cache)
            ours.append(logits(model, cache, 5, 6, 7))
        outputs.append(ours)
    assert all(map(torch.equal, *outputs))
