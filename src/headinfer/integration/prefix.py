"""What of a cache a new prompt begins with."""

import reprlib
from typing import TYPE_CHECKING

import torch

from headinfer.errors import CacheStateError, OptionError
from headinfer.integration.token_history import common_prefix

if TYPE_CHECKING:
    from headinfer.integration.cache import OffloadedCache

_WHOLE = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def prompt_ids(ids: object) -> torch.Tensor:
    """Return the token ids of one prompt, `[tokens]` of int64 on the CPU.

    Raises:
        OptionError: they are none, or of several rows.
    """
    try:
        given = torch.as_tensor(ids)
    except (TypeError, ValueError, RuntimeError):
        given = None
    if given is not None:
        one_row = given.ndim == 1 or (given.ndim == 2 and len(given) == 1)
        if one_row and (given.dtype in _WHOLE or not given.numel()):
            return given.reshape(-1).to("cpu", torch.long)
    shown = " ".join(reprlib.repr(ids).split())
    raise OptionError(f"ids must be the token ids of one prompt, a list or a tensor, not {shown}")


def keep_common_prefix(cache: "OffloadedCache", ids: torch.Tensor) -> int:
    """Keep the tokens that a prompt begins with, as `OffloadedCache.keep_common_prefix` says.

    Args:
        cache: of one row.
        ids: from `prompt_ids`.
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
    kept = min(common_prefix(known[0], ids), len(ids) - 1)
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
