"""Passes of several tokens that are captured and replayed, as those that verify drafts are."""

import shutil
import sys
from typing import Any

import pytest
import torch

import headinfer
from captured import SIMULATED, step
from headinfer.engine.ready import Form
from headinfer.integration.calls import cache_argument
from headinfer.offload import Offload
from headinfer.schedule import route
from tiny_models import random_tokens, shared_model

PLACEMENTS: dict[str, dict[str, Any]] = {
    "resident": {"resident_tokens": "all"},
    "streamed": {"resident_tokens": 0, "tile_heads": 1, "tile_tokens": 48, "chunk_tokens": 128},
    "host": {"resident_tokens": 0, "host_attention": 0.99, "chunk_tokens": 128},
    "both": {
        "resident_tokens": 9,
        "host_attention": 0.5,
        "tile_heads": 2,
        "tile_tokens": 16,
        "chunk_tokens": 128,
    },
}
"""Pages of 64 tokens."""

BEST = {each: Form.ONE_LAUNCH if each == "resident" else Form.STREAMED for each in PLACEMENTS}

PROMPT_TOKENS = 150

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or shutil.which("cc") is None, reason="no jobs without a C compiler"
)


@pytest.fixture(autouse=True)
def _few_tokens_are_steady(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have what is streamed stay for a while though there are few tokens in a test."""
    monkeypatch.setattr(route, "STEADY_TOKENS", 48)
    monkeypatch.setattr(route, "_STEADY_FROM", 0)


def forms(cache: Any, new_tokens: int) -> set[Form]:
    """Return the forms in which passes of so many tokens are captured."""
    captured = cache.state.engine.captured
    return {form for (_, form), each in captured.items() if each.new_tokens == new_tokens}


def verified(model: Any, cache: Any, count: int, accepted: int, seed: int) -> torch.Tensor:
    """Return the logits of a pass, all but some of whose tokens are then taken back."""
    tokens = random_tokens(1, count, seed=seed)
    logits: torch.Tensor = model(tokens, **cache_argument(model, cache)).logits
    if accepted < count:
        cache.crop(accepted - count)
    return logits


def prompted(offload: Offload, model: Any, seed: int = 1) -> Any:
    cache = offload.new_cache(400)
    model(random_tokens(1, PROMPT_TOKENS, seed=seed), **cache_argument(model, cache))
    return cache


def outcomes(name: str, placement: str, use: Any, **options: Any) -> headinfer.Stats:
    """Return the stats of `use` with captures; without, it gives the same tensors."""
    model, found = shared_model(name), []
    settings = {**SIMULATED, **PLACEMENTS[placement], **options}
    for capture in (False, True):
        with headinfer.attach(model, **settings, capture=capture) as offload:
            found.append(use(offload, model))
            stats = offload.stats
        if not capture:
            assert stats.captured_verifications == 0
    assert all(map(torch.equal, *found))
    return stats


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("count", [2, 5, 16])
def test_passes_have_the_bits_of_launched_ones(placement: str, count: int) -> None:
    """Whatever is accepted of them, over several pages."""

    def use(offload: Offload, model: Any) -> list[torch.Tensor]:
        cache = prompted(offload, model)
        taken = [1 + (3 * at) % count for at in range(24)]
        found = [verified(model, cache, count, each, at) for at, each in enumerate(taken)]
        assert cache.get_seq_length() == PROMPT_TOKENS + sum(taken)
        assert not offload.stats.captures or BEST[placement] in forms(cache, count)
        return found

    stats = outcomes("llama3", placement, use)
    print(placement, count, stats.captured_verifications, stats.captures)
    assert stats.captured_verifications == stats.captured_steps > 24 / 3
