"""A cache that is given its own prompt again: results are stock's, and the log says so."""

import logging
from typing import Any

import pytest
import torch
from transformers import DynamicCache

import headinfer
from headinfer.errors import CacheStateError
from headinfer.integration.calls import cache_argument
from tiny_models import random_tokens, shared_model

DEVICES = ["cpu", "simulated"]


def generated(model: Any, ids: torch.Tensor, cache: Any, new_tokens: int = 6) -> torch.Tensor:
    keyword = cache_argument(model, cache)
    mask = torch.ones_like(ids)
    rows: torch.Tensor = model.generate(
        ids, attention_mask=mask, max_new_tokens=new_tokens, do_sample=False, **keyword
    )
    return rows


def generated_or_refused(*arguments: Any) -> torch.Tensor | str:
    try:
        return generated(*arguments)
    except CacheStateError as refused:
        return str(refused)


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    told = [each for each in caplog.records if each.name.startswith("headinfer.")]
    caplog.clear()
    return [each.getMessage() for each in told if each.levelno >= logging.WARNING]


@pytest.mark.covering
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("new_tokens", [2, 6, 9])
def test_a_prompt_that_comes_again_is_told(
    device: str, new_tokens: int, caplog: pytest.LogCaptureFixture
) -> None:
    model, ids = shared_model("llama3"), random_tokens(1, 41)
    stock = DynamicCache(config=model.config)
    generated(model, ids, stock, new_tokens)
    expected = generated(model, ids, stock, new_tokens)
    with headinfer.attach(model, device=device) as offload:
        cache = offload.new_cache()
        first = generated(model, ids, cache, new_tokens)
        assert warnings(caplog) == []
        again = generated_or_refused(model, ids, cache, new_tokens)
        if isinstance(again, str):  # older transformers bring the prompt's own mask
            assert "its attention mask is for 41" in again
            return
        assert torch.equal(again, expected)
        held, left_out = 41 + new_tokens - 1, new_tokens - 1
        (line,) = warnings(caplog)
        assert f"holds {held} tokens, and {41 - left_out} of them come again" in line
        assert cache.keep_common_prefix(ids) == 40
        assert torch.equal(generated(model, ids, cache, new_tokens), first)
        assert warnings(caplog) == []


def test_another_prompt_that_begins_alike_is_told_too(caplog: pytest.LogCaptureFixture) -> None:
    model, ids = shared_model("llama3"), random_tokens(1, 60)
    other = torch.cat([ids[:, :40], random_tokens(1, 15, seed=3)], dim=1)
    with headinfer.attach(model, device="cpu") as offload, torch.no_grad():
        cache = offload.new_cache()
        model(ids, **cache.as_keyword())
        warnings(caplog)
        model(other, **cache.as_keyword())
        (line,) = warnings(caplog)
    assert "and 40 of them come again" in line


def test_ordinary_conversations_are_not(caplog: pytest.LogCaptureFixture) -> None:
    """Turns begin with the same template, and a user asks the same twice."""
    model = shared_model("llama3")
    system, begin, end = random_tokens(1, 8), random_tokens(1, 5, seed=1), torch.tensor([[3]])
    question = random_tokens(1, 30, seed=2)
    with headinfer.attach(model, device="cpu") as offload:
        cache, said = offload.new_cache(), torch.cat([system, begin, question, end], dim=1)
        for _ in range(4):
            said = generated(model, said, cache, 7)
            said = torch.cat([said, end, begin, question, end], dim=1)
        fifteen = torch.cat([said[:, :15], torch.tensor([[2]]), question], dim=1)
        with torch.no_grad():
            model(fifteen, **cache.as_keyword())
    assert warnings(caplog) == []
