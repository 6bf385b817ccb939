"""On a GPU packed tokens give the bits of dense ones, launched and captured, also with the CPU."""

from typing import Any

import pytest
import torch

import headinfer
from captured import generated
from headinfer.engine.ready import Form
from headinfer.schedule import route
from tiny_models import random_tokens, tiny_model

pytestmark = pytest.mark.gpu

PLACEMENTS: dict[str, dict[str, Any]] = {
    "sequential": {"overlap": False, "tile_tokens": 128, "capture": False},
    "launched": {"resident_tokens": 64, "tile_tokens": 128, "capture": False},
    "streamed": {"tile_heads": 1, "tile_tokens": 64},
    "host": {"host_attention": 0.99},
    "both": {"resident_tokens": 64, "host_attention": 0.5, "tile_tokens": 64},
}
"""Whose tiles end where packed pages do: with others partial results merge in another order.

Tiles also end where pieces of host memory do. Those of 534 tokens, reserved at once for chunks of
128, have whole pages.
"""


@pytest.fixture(autouse=True)
def _few_tokens_are_steady(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have what is streamed stay for a while though there are few tokens in a test."""
    monkeypatch.setattr(route, "STEADY_TOKENS", 64)
    monkeypatch.setattr(route, "_STEADY_FROM", 0)


@pytest.mark.parametrize("head_dim", [32, 128])
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_packed_tokens_give_the_bits_of_dense_ones(placement: str, head_dim: int) -> None:
    model = tiny_model("llama3", head_dim=head_dim).to("cuda", torch.bfloat16)
    outcomes = []
    for kv_cache in ("dense", "packed"):
        options = {"resident_tokens": 0, "host_attention": "off", **PLACEMENTS[placement]}
        with headinfer.attach(
            model, kv_cache=kv_cache, chunk_tokens=128, fuse="off", **options
        ) as offload:
            assert offload.plan.shape.packs == (kv_cache == "packed")
            outputs = []
            for batch in (1, 2):
                cache = offload.new_cache(max_tokens=534)
                tokens = random_tokens(batch, 384).cuda()
                outputs.append(generated(model, tokens, cache, max_new_tokens=150))
                forms = {form for _, form in cache.state.engine.captured}
                assert (Form.STREAMED in forms) == options.get("capture", True)
            outcomes.append(outputs)
    for dense, packed in zip(*outcomes, strict=True):
        assert torch.equal(dense.sequences, packed.sequences)
        assert torch.equal(torch.stack(dense.logits), torch.stack(packed.logits))
