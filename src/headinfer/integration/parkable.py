"""Caches that do without GPU memory between two requests."""

from typing import TYPE_CHECKING, Any, cast

from headinfer.integration.copying import copied
from headinfer.integration.layer import OffloadedLayer
from headinfer.integration.turns import Turns, in_turn
from headinfer.integration.whole import WholeCache

if TYPE_CHECKING:
    from headinfer.integration.cache import OffloadedCache


class ParkableCache(WholeCache):
    """A cache that can be parked and forked; see `OffloadedCache`."""

    @property
    def turns(self) -> Turns:
        """Taken by whatever changes the cache."""
        return self.state.turns

    @in_turn
    def fork(self) -> Any:
        """Return a second `OffloadedCache` that holds the same tokens, parked: see `park`.

        The two share CPU memory. Neither ever writes to what both hold, if they have one row.

        Raises:
            CacheStateError: it was closed, the model was detached, or a call was interrupted.
        """
        return copied(cast("OffloadedCache", self), {}, parked=True)

    def park(self) -> None:
        """Give up GPU memory, but for recurrent states, until the next call with the cache.

        CPU memory that was reserved for tokens to come goes, too. A parked cache can be cropped,
        forked and saved.

        Raises:
            CacheStateError: it was closed, or its newest tokens were not attended yet.
        """
        self.state.park()

    @property
    def earliest_crop(self) -> int:
        """The fewest tokens, but for none, that a parked cache can be cropped to."""
        if not all(isinstance(layer, OffloadedLayer) for layer in self.layers):
            return int(self.get_seq_length())
        return 0 if self.state.engine is None else self.state.engine.earliest_crop

    def compact(self) -> None:
        """Copy what a parked cache holds where that is a small part of the memory it holds."""
        if self.state.parked and self.state.engine is not None:
            self.state.engine.compact()
