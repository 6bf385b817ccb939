"""Places that a cache can go back to, also where its layers cannot drop their newest tokens."""

import copy
from dataclasses import dataclass, field

from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer, QuantizedLayer

from headinfer.errors import MemoryPlanError
from headinfer.integration.cache import OffloadedCache
from headinfer.integration.layer import OffloadedLayer, WindowLayer
from headinfer.plan.memory import SPARE_TOKENS


@dataclass(slots=True, kw_only=True)
class Place:
    """A place in a cache: its first tokens, and what cannot be had from the cache later.

    Attributes:
        tokens: how many the cache held.
        layers: copies, by number, of transformers' layers that cannot drop tokens.
        cache: a copy of ours, where one of its layers cannot.
        is_lost: whether there was no memory for that copy, so that the tokens must pass again.
    """

    tokens: int
    layers: dict[int, CacheLayerMixin] = field(default_factory=dict)
    cache: OffloadedCache | None = None
    is_lost: bool = False

    def close(self) -> None:
        """Release the copy of ours."""
        if self.cache is not None:
            self.cache.close()
            self.cache = None


def place_in(cache: Cache, tokens: int, most: int) -> Place:
    """Return where a cache is.

    A copy of ours shares CPU memory with the cache until either changes. Transformers' windows are
    copied as they are, which is little. Its quantised layers replace their tensors and never
    write into them, so that a copy takes memory only once they do.

    Args:
        cache: of any method.
        tokens: how many it holds.
        most: the most tokens that will pass before it goes back.
    """
    if isinstance(cache, OffloadedCache):
        if all(_can_drop(layer, most) for layer in cache.layers):
            return Place(tokens=tokens)
        copied = _copy_of_ours(cache)
        return Place(tokens=tokens, cache=copied, is_lost=copied is None)
    kept = {
        number: _copied(layer)
        for number, layer in enumerate(cache.layers)
        if type(layer) is not DynamicLayer
    }
    return Place(tokens=tokens, layers=kept)


def went_back(cache: Cache, place: Place, *, again: bool) -> Cache | None:
    """Return a cache as it was at a place; None where all its tokens must pass again.

    Args:
        cache: what the place was taken in. It is used up.
        place: where to go.
        again: whether the place will be gone back to once more.
    """
    if isinstance(cache, OffloadedCache):
        return _our_cache_at(cache, place, again=again)
    for number, layer in enumerate(cache.layers):
        if number in place.layers:
            kept = place.layers[number]
            cache.layers[number] = _copied(kept) if again else kept
        elif (surplus := layer.get_seq_length() - place.tokens) > 0:
            layer.crop(-surplus)
    return cache


def _our_cache_at(cache: OffloadedCache, place: Place, *, again: bool) -> OffloadedCache | None:
    if place.is_lost:
        cache.close()
        return None
    if place.cache is None:
        cache.crop(place.tokens - cache.get_seq_length())
        return cache
    cache.close()  # first: its memory is wanted
    if again:
        copied = _copy_of_ours(place.cache)
        if copied is None:
            place.close()
            place.is_lost = True
        return copied
    kept, place.cache = place.cache, None
    return kept


def _can_drop(layer: CacheLayerMixin, tokens: int) -> bool:
    """Whether a layer of our caches can drop so many of its newest tokens, however long it is."""
    if isinstance(layer, WindowLayer):
        return tokens <= SPARE_TOKENS
    return isinstance(layer, OffloadedLayer)


def _copy_of_ours(cache: OffloadedCache) -> OffloadedCache | None:
    try:
        return copy.deepcopy(cache)
    except MemoryPlanError:
        return None


def _copied(layer: CacheLayerMixin) -> CacheLayerMixin:
    return copy.copy(layer) if isinstance(layer, QuantizedLayer) else copy.deepcopy(layer)
