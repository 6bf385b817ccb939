"""Caches that notice when a call of the model stopped half-way."""

from transformers.cache_utils import DynamicCache

from headinfer.errors import CacheStateError
from headinfer.integration.state import OffloadedState


class WholeCache(DynamicCache):
    """A cache that tells whether all its layers hold the same tokens; see `OffloadedCache`.

    Attributes:
        state: what is behind its layers.
        lengths_before: tokens of each layer before the call that is under way; None between calls.
    """

    state: OffloadedState
    lengths_before: list[int] | None = None
    _attention_layers: int

    def _lengths(self) -> list[int]:
        """Return the tokens of each layer that keeps any."""
        return self.state.lengths() or [0] * self._attention_layers

    def begin_call(self) -> None:
        """Note the state before a model call.

        Raises:
            CacheStateError: the call before was interrupted half-way, so that some layers hold
                tokens which others lack.
        """
        self.lengths_before = self.check_whole()

    def check_whole(self) -> list[int]:
        """Return the tokens of each layer.

        Raises:
            CacheStateError: its last call stopped half-way.
        """
        lengths = self._lengths()
        if self.lengths_before is None:
            return lengths
        stateful = len(lengths) < len(self.layers)  # linear attention: nothing tells it advanced
        if stateful or self.lengths_before != lengths:
            raise CacheStateError(
                "a call of the model with this cache was interrupted, so its layers no longer hold "
                "the same tokens; call reset() on it or use a new cache"
            )
        return lengths

    def end_call(self) -> None:
        """Note that the call went through all layers."""
        self.lengths_before = None
