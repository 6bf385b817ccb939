"""Whether a call goes on where its cache ends, told before transformers computes shapes from it."""

import logging
from typing import TYPE_CHECKING, Any

import torch
from transformers import Cache

from headinfer.errors import CacheStateError
from headinfer.integration.token_history import common_prefix
from headinfer.units import counted

if TYPE_CHECKING:
    from headinfer.integration.cache import OffloadedCache

_logger = logging.getLogger(__name__)

_LEAST_TOKENS = 16
"""Fewer that are alike are a chat template's."""


def check_given(arguments: dict[str, Any], cache: Cache | None) -> None:
    """Refuse a call without new tokens where none came before, either.

    Args:
        arguments: of the call, by name.
        cache: of the call, if any.

    Raises:
        CacheStateError: names the argument and its shape.
    """
    if cache is not None and cache.get_seq_length():
        return  # tokens that it has already were left out of the call
    name = "inputs_embeds" if arguments.get("input_ids") is None else "input_ids"
    raise CacheStateError(
        f"the call brings no tokens: {name} has the shape {tuple(arguments[name].shape)}; pass at "
        "least one token"
    )


def check_history(arguments: dict[str, Any], past_tokens: int, new_tokens: int) -> None:
    """Refuse a call that was made for another history than the cache holds.

    Args:
        arguments: of the call, by name.
        past_tokens: tokens in the cache.
        new_tokens: tokens of the call.

    Raises:
        CacheStateError: says how many tokens each has.
    """
    held = f"the cache holds {counted(past_tokens, 'token')}"
    if new_tokens == 0:
        raise CacheStateError(
            f"{held}, and the call brings no new ones: pass the whole conversation that the cache "
            "was filled with and new tokens behind it, or a new cache"
        )
    mask = arguments.get("attention_mask")
    if past_tokens and isinstance(mask, torch.Tensor) and mask.ndim == 2:
        wanted, columns = past_tokens + new_tokens, mask.shape[1]
        if columns < wanted:
            raise CacheStateError(
                f"{held} and the call brings {new_tokens:,}, but its attention mask is for "
                f"{columns:,} and not for {wanted:,}: pass the mask of the whole conversation, or "
                "a new cache for another one"
            )


def tell_of_repetition(cache: "OffloadedCache", new_ids: torch.Tensor) -> None:
    """Warn where new tokens are those that the cache begins with: the prompt is read twice then.

    `generate` leaves tokens out of a prompt that is no longer than what a cache holds: as many as
    there are more in the cache. So the new ones may begin later in the prompt.

    Args:
        cache: filled.
        new_ids: `[rows, tokens]`. Several rows are not looked at: they may begin with padding.
    """
    known = cache.token_ids
    if known is None or len(known) != 1 or len(new_ids) != 1 or new_ids.shape[1] < _LEAST_TOKENS:
        return
    held, new = known[0], new_ids[0].to("cpu", torch.long)
    left_out, odd = divmod(len(held) - len(new), 2)
    starts = {0} if odd or left_out < 0 else {0, left_out}
    alike = max(common_prefix(held[start:], new) for start in starts)
    if alike >= _LEAST_TOKENS:
        _logger.warning(
            "the cache holds %d tokens, and %d of them come again: the model sees them twice; "
            "cache.keep_common_prefix(ids) before the call goes on from what is alike",
            len(held),
            alike,
        )
