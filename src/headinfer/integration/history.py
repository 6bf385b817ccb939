"""Whether a call goes on where its cache ends, told before transformers computes shapes from it."""

from typing import Any

import torch

from headinfer.errors import CacheStateError


def check_history(arguments: dict[str, Any], past_tokens: int, new_tokens: int) -> None:
    """Refuse a call that was made for another history than the cache holds.

    Args:
        arguments: of the call, by name.
        past_tokens: tokens in the cache.
        new_tokens: tokens of the call.

    Raises:
        CacheStateError: says how many tokens each has.
    """
    held = f"the cache holds {past_tokens:,} tokens"
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
