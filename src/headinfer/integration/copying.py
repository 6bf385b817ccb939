"""A second cache that holds the same tokens as another one."""

import copy
from typing import TYPE_CHECKING, Any

from headinfer.integration.layer import OffloadedLayer

if TYPE_CHECKING:
    from headinfer.integration.cache import OffloadedCache


def copied(cache: "OffloadedCache", memo: dict[int, Any], *, parked: bool) -> "OffloadedCache":
    """Return a copy of a cache, as `OffloadedCache.__deepcopy__` and `fork` say.

    Args:
        cache: between two calls; the caller has the turn.
        memo: of `copy.deepcopy`.
        parked: whether the copy is to be parked.
    """
    cache.state.check_open()
    cache.check_whole()
    made: OffloadedCache = cache.state.host.new_cache(cache.state.max_tokens)
    try:
        made.state.copy_from(cache.state, parked=parked)
        for position, layer in enumerate(cache.layers):
            if isinstance(layer, OffloadedLayer):
                made.layers[position].copy_form_of(layer)
            else:
                made.layers[position] = copy.deepcopy(layer, memo)
            memo[id(layer)] = made.layers[position]
    except BaseException:
        made.close()
        raise
    memo[id(cache.layers)] = made.layers
    made.lengths_before = cache.lengths_before
    made.history, made.saved = cache.history.copy(), cache.saved
    made.rounded = cache.rounded
    return made
