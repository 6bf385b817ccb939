"""Long prompts pass through the model a chunk at a time (the paper's section 3.4).

Done in front of the model's own forward, so that it holds for every way of generating, including
those in which transformers' `prefill_chunk_size` is not looked at.
"""

import inspect
import itertools
from collections.abc import Callable
from typing import Any

import torch

from headinfer.integration.calls import CACHE_NAMES, new_shape

_SLICED = frozenset({"input_ids", "inputs_embeds", "token_type_ids", "cache_position"})
"""Arguments with one entry a new token, on axis 1 (`cache_position`: on its last axis)."""

_WHOLE = frozenset({*CACHE_NAMES, "use_cache", "return_dict", "logits_to_keep", "tokenizer"})
"""Arguments that mean the same for every chunk."""


def can_split(config: Any, arguments: dict[str, Any]) -> bool:
    """Whether a call gives the same result chunk by chunk: all of its arguments are understood.

    Args:
        config: of the decoder; holds the defaults of some arguments.
        arguments: of the call, by name.
    """
    for name in ("output_hidden_states", "output_router_logits"):
        if arguments.get(name) is None and getattr(config, name, False):
            return False
    if arguments.get("return_dict") is None and getattr(config, "return_dict", True) is False:
        return False
    for name, value in arguments.items():
        if name in _SLICED or name in _WHOLE or name == "position_ids" or value is None:
            continue
        if name == "attention_mask" and isinstance(value, torch.Tensor) and value.ndim == 2:
            continue
        if value is False:
            continue
        return False
    return arguments.get("return_dict") is not False and not isinstance(
        arguments.get("logits_to_keep"), torch.Tensor
    )


def split_points(new_tokens: int, chunk_tokens: int, keep: int) -> list[int]:
    """Return where chunks begin and the last one ends.

    Args:
        new_tokens: tokens of the call.
        chunk_tokens: tokens of a chunk.
        keep: how many of the last positions must stay together in the last chunk.
    """
    points = list(range(0, new_tokens, chunk_tokens))
    while len(points) > 1 and new_tokens - points[-1] < keep:
        points.pop()
    return [*points, new_tokens]


def slice_call(arguments: dict[str, Any], start: int, end: int, past_tokens: int) -> dict[str, Any]:
    """Return a call's arguments for the new tokens from `start` to before `end` alone."""
    sliced = dict(arguments)
    for name, value in arguments.items():
        if value is None:
            continue
        if name in ("position_ids", "cache_position"):
            sliced[name] = value[..., start:end]
        elif name in _SLICED:
            sliced[name] = value[:, start:end]
        elif name == "attention_mask":
            sliced[name] = value[:, : past_tokens + end]
    return sliced


def run_leading_chunks(
    model: torch.nn.Module,
    arguments: dict[str, Any],
    chunk_tokens: int,
    past_tokens: int,
    after_chunk: Callable[[int, int], None],
) -> tuple[dict[str, Any], list[torch.Tensor]]:
    """Run all chunks of a call but the last.

    Args:
        model: the attached model.
        arguments: of the call, by name; `can_split` holds.
        chunk_tokens: tokens of a chunk.
        past_tokens: tokens in the cache before the call.
        after_chunk: told the new tokens done so far and all, after each chunk.

    Returns:
        The arguments of the last chunk, and the logits of the chunks run, each `[batch, tokens,
        vocab]`, when the call asks for all logits; otherwise none.
    """
    shape = new_shape(arguments)
    assert shape is not None
    keeps = "logits_to_keep" in inspect.signature(model.forward).parameters
    keep = int(arguments.get("logits_to_keep") or 0) if keeps else 0
    points = split_points(shape[1], chunk_tokens, keep)
    logits = []
    for start, end in itertools.pairwise(points[:-1]):
        part = slice_call(arguments, start, end, past_tokens)
        if keep:
            part["logits_to_keep"] = 1  # the least the model can compute; not used
        output = model.forward(**part)
        if not keep:
            logits.append(output.logits)
        after_chunk(end, shape[1])
    return slice_call(arguments, points[-2], points[-1], past_tokens), logits
