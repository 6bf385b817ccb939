"""What of a cache a new prompt begins with."""

from typing import TYPE_CHECKING

import torch

from headinfer.errors import CacheStateError
from headinfer.integration.token_history import common_prefix

if TYPE_CHECKING:
    from headinfer.integration.cache import OffloadedCache


def keep_common_prefix(cache: "OffloadedCache", ids: torch.Tensor) -> int:
    """Keep the tokens that a prompt begins with, as `OffloadedCache.keep_common_prefix` says.

    Args:
        cache: of one row.
        ids: the prompt, `[tokens]`.
    """
    held, known = cache.get_seq_length(), cache.token_ids
    if known is None:
        if held:
            cache.reset()
        return 0
    if len(known) != 1:
        raise CacheStateError(
            f"this cache holds {len(known)} rows, and a prompt is compared with one; keep one with "
            "batch_select_indices"
        )
    kept = min(common_prefix(known[0], ids.to("cpu", torch.long)), len(ids) - 1)
    if kept <= 0:
        cache.reset()
        return 0
    if kept < held and not _crop(cache, held - kept):
        cache.reset()
        return 0
    return kept


def _crop(cache: "OffloadedCache", tokens: int) -> bool:
    """Remove the newest tokens; return whether the cache could."""
    try:
        cache.crop(-tokens)
    except (CacheStateError, RuntimeError):  # the second by transformers, of its own layers
        return False
    return True
