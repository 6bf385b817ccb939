"""Decode steps in one capture though tokens are streamed in them, or attended by the host."""

import shutil
import sys
from typing import Any

import pytest
import torch

import headinfer
from captured import (
    few,
    generated,
    launched,
    stock_generated,
)
from headinfer.engine.ready import Form
from headinfer.offload import Offload
from headinfer.schedule import route
from tiny_models import random_tokens, shared_model

PLACEMENTS: dict[str, dict[str, Any]] = {
    "streamed": {"resident_tokens": 0, "tile_heads": 1, "tile_tokens": 24},
    "host": {"resident_tokens": 0, "host_attention": 0.99, "tile_tokens": 24},
    "both": {"resident_tokens": 9, "host_attention": 0.5, "tile_tokens": 24},
}
needs_jobs = pytest.mark.skipif(
    sys.platform != "linux" or shutil.which("cc") is None, reason="no jobs without a C compiler"
)


@pytest.fixture(autouse=True)
def _few_tokens_are_steady(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have what is streamed stay for as few tokens as a test has."""
    monkeypatch.setattr(route, "STEADY_TOKENS", 16)
    monkeypatch.setattr(route, "_STEADY_FROM", 2)


def forms(cache: Any) -> list[Form]:
    """Return the forms in which a cache's steps are captured."""
    return [form for _, form in cache.state.engine.captured]


def outcomes(
    name: str, placement: str, use: Any, **options: Any
) -> tuple[headinfer.Stats, list[torch.Tensor]]:
    """Return the stats and what `use` returns with captures; without, it is the same."""
    found = []
    for capture in (False, True):
        settings = {"device": "simulated", **PLACEMENTS[placement], **options}
        with headinfer.attach(shared_model(name), **settings, capture=capture) as offload:
            found.append(use(offload))
            stats = offload.stats
    assert all(map(torch.equal, *found))
    return stats, found[1]


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_it_works(placement: str) -> None:
    model, tokens = shared_model("llama3"), random_tokens(1, 70)

    def use(offload: Offload) -> list[torch.Tensor]:
        cache = offload.new_cache()
        result = generated(model, tokens, cache, max_new_tokens=40)
        if offload.stats.captures:
            assert forms(cache) == [Form.STREAMED]
        return [result.sequences, *result.logits]

    stats, ours = outcomes("llama3", placement, use)
    stock = stock_generated(model, tokens, max_new_tokens=40)
    assert torch.equal(ours[0], stock.sequences)
    print(stats, launched(stats), few(70, 39))
