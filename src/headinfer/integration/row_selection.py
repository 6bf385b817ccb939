"""The rows of a whole cache: how many there are, and choosing some of them."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch

from headinfer.integration.layer import OffloadedLayer

if TYPE_CHECKING:
    from headinfer.integration.cache import OffloadedCache


def rows_of(layers: Iterable[Any]) -> int | None:
    """Return the rows that layers of transformers' own hold; None where they hold nothing.

    Args:
        layers: with keys and values, or with states.
    """
    for layer in layers:
        states = getattr(layer, "conv_states", {}), getattr(layer, "recurrent_states", {})
        kept = [
            getattr(layer, "keys", None),
            *(part for each in states for part in each.values()),
        ]
        for part in kept:
            if part is not None and part.ndim > 1:
                return int(part.shape[0])
    return None


def select(cache: "OffloadedCache", rows: torch.Tensor, batch: int) -> None:
    """Make row `i` of a cache what row `rows[i]` was.

    Args:
        cache: the caller has the turn.
        rows: from `chosen_rows`.
        batch: rows it has.
    """
    numbers, engine = rows.tolist(), cache.state.engine
    if numbers == list(range(batch)):
        return
    if engine is not None:
        engine.settle_writes()  # which may refuse, before anything has changed
    in_place = engine is not None and len(numbers) == batch and not engine.parked
    if not in_place:
        cache.state.select_rows(numbers)
    with cache.state.changing():
        for layer in cache.layers:
            if not isinstance(layer, OffloadedLayer):
                layer.reorder_cache(rows)  # of any number; layers of states have no other method
            elif in_place:
                layer.select(numbers)
    cache.history.select(numbers)
    cache.saved = None
