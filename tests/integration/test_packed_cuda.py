"""Packed tokens on a GPU give the bits of dense ones; run with `pytest -m gpu`."""

import copy
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import headinfer
from headinfer.engine.ready import Form
from tiny_models import random_tokens, tiny_model

pytestmark = pytest.mark.gpu

STREAMED: dict[str, Any] = {
    "tile_heads": 1,
    "tile_tokens": 1024,
    "chunk_tokens": 512,
    "resident_tokens": 0,
    "host_attention": "off",
    "fuse": "off",
}
WAYS: dict[str, dict[str, Any]] = {
    "launched": {"capture": False},
    "sequential": {"overlap": False, "capture": False},
    "captured": {},
    "behind residents": {"resident_tokens": 300},
    "with host attention": {"host_attention": 0.4, "resident_tokens": 300},
    "all the host's": {"host_attention": 0.98},
}
PROMPT_TOKENS, STEPS = 9001, 80


def use(model: PreTrainedModel, kv_cache: str, way: str) -> tuple[list[torch.Tensor], set[Form]]:
    """Go through what moves tokens; return what comes of it, and the forms of captures."""
    prompt = random_tokens(2, PROMPT_TOKENS).cuda()
    options = {**STREAMED, **WAYS[way]}
    with headinfer.attach(model, kv_cache=kv_cache, **options) as offload:
        cache = offload.new_cache(PROMPT_TOKENS + 400)
        outputs = [model(prompt, past_key_values=cache, logits_to_keep=1).logits]
        for step in range(STEPS):  # more than a page goes home
            token = prompt[:, step : step + 1]
            outputs.append(model(token, past_key_values=cache).logits.clone())
        forms = {form for _, form in cache.state.engine.captured}
        outputs += [cache.layers[0].keys.clone(), cache.layers[1].values.clone()]
        cache.crop(-1070)
        outputs.append(model(prompt[:, :9], past_key_values=cache).logits)
        other = copy.deepcopy(cache)
        outputs.append(model(prompt[:, :700], past_key_values=cache).logits)
        outputs.append(model(prompt[:, :3], past_key_values=other).logits)
        assert offload.plan.shape.packs == (kv_cache == "packed")
    return outputs, forms


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("head_dim", [32, 128])
def test_packed_tokens_give_the_bits_of_dense_ones(head_dim: int, way: str) -> None:
    model = tiny_model("llama3", head_dim=head_dim).to("cuda", torch.bfloat16)
    dense, _ = use(model, "dense", way)
    packed, forms = use(model, "packed", way)
    if WAYS[way].get("capture", True):
        assert Form.STREAMED in forms
    assert all(map(torch.equal, dense, packed))


@pytest.mark.parametrize("way", ["captured", "with host attention"])
def test_pages_that_overflow_give_the_bits_of_dense_ones(way: str) -> None:
    """Projections whose rows differ by up to 2^60: exponents of one page are all over."""
    model = tiny_model("llama3", head_dim=32).to("cuda", torch.bfloat16)
    with torch.no_grad():
        for layer in model.model.layers:
            weight = layer.self_attn.v_proj.weight
            powers = torch.arange(weight.shape[0], device="cuda") % 61 - 50
            weight.mul_(torch.exp2(powers.float()).to(weight.dtype)[:, None])
    dense, _ = use(model, "dense", way)
    packed, _ = use(model, "packed", way)
    assert all(map(torch.equal, dense, packed))
