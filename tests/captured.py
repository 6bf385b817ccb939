"""Generating with captured decode steps, and with the same steps launched kernel by kernel."""

from collections.abc import Callable
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel

import headinfer
from headinfer.integration.calls import cache_argument
from headinfer.offload import Offload
from tiny_models import random_tokens

SIMULATED: dict[str, Any] = {"device": "simulated", "resident_tokens": "all"}
"""A device that captures, with all tokens where a captured step needs them."""


def generated(model: PreTrainedModel, tokens: torch.Tensor, cache: Any, **options: Any) -> Any:
    """Return what `generate` gives, with the logits of each step."""
    torch.manual_seed(7)
    return model.generate(
        tokens,
        **cache_argument(model, cache),
        attention_mask=torch.ones_like(tokens),
        **{"do_sample": False, "max_new_tokens": 20, **options},
        return_dict_in_generate=True,
        output_logits=True,
    )


def stock_generated(model: PreTrainedModel, tokens: torch.Tensor, **options: Any) -> Any:
    """Return what it gives with transformers' own cache."""
    return generated(model, tokens, DynamicCache(config=model.config), **options)


def with_and_without_capture(
    model: PreTrainedModel, use: Callable[[Offload], list[torch.Tensor]], **options: Any
) -> tuple[headinfer.Stats, list[torch.Tensor]]:
    """Return the stats and the tensors that `use` returns with captures; without, they are equal.

    Args:
        model: not attached.
        use: uses the model, which is attached.
        **options: of the attachment.
    """
    outcomes = []
    for capture in (False, True):
        with headinfer.attach(model, **SIMULATED, capture=capture, **options) as offload:
            outcomes.append(use(offload))
            stats = offload.stats
        if not capture:
            assert (stats.captures, stats.captured_steps) == (0, 0)
    eager, captured = outcomes
    assert len(eager) == len(captured)
    assert all(map(torch.equal, eager, captured))
    return stats, captured


def launched(stats: headinfer.Stats) -> int:
    """Return how many decode steps were launched kernel by kernel."""
    return stats.decode_steps - stats.captured_steps


def prompted(offload: Offload, model: PreTrainedModel, rows: int = 1, seed: int = 1) -> Any:
    """Return a new cache with a prompt of 40 tokens in it."""
    cache = offload.new_cache()
    model(random_tokens(rows, 40, seed=seed), **cache_argument(model, cache))
    return cache


def step(model: PreTrainedModel, cache: Any, token: int = 5, **arguments: Any) -> torch.Tensor:
    """Return the logits of one decode step."""
    if "inputs_embeds" not in arguments:
        arguments.setdefault("input_ids", torch.full((1, 1), token))
    logits: torch.Tensor = model(**cache_argument(model, cache), **arguments)["logits"]
    return logits


def steps(
    model: PreTrainedModel, cache: Any, count: int, *, first: int = 0, **arguments: Any
) -> list[torch.Tensor]:
    """Return the logits of some decode steps, each of another token."""
    return [step(model, cache, 3 + at % 90, **arguments) for at in range(first, first + count)]


NEW_KIND, NEW_CACHE, NEW_TURN = 3, 2, 1
"""Steps that are launched until a capture is replayed alone: the first, captured, compared.

The first capture of a kind is compared one step later than it is made, and any other in that step.
What a cache has captured already is only compared.
"""


def few(past_tokens: int, steps: int, *, begin: int = NEW_KIND) -> int:
    """Return how many of some steps in a row are launched, the first behind so many tokens.

    One of them is at each power of two, where captures are compared again.
    """
    alone = range(past_tokens + begin, past_tokens + steps)
    return begin + sum(tokens & (tokens - 1) == 0 for tokens in alone)
