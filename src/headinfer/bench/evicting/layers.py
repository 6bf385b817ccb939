"""Layers of a cache that keep some of the tokens they have seen."""

from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedConfig
from transformers.cache_utils import CacheLayerMixin, DynamicCache, DynamicLayer

SINK_TOKENS = 4
"""First tokens that StreamingLLM keeps for ever, as many as its authors do."""


class EvictingLayer(DynamicLayer):
    """A layer that drops tokens, and counts all that it has seen.

    Args:
        kept_tokens: the most tokens that it holds between two passes.

    Attributes:
        kept_tokens: as given.
        seen_tokens: tokens that have passed. The next one has this position in its text.
    """

    is_croppable = False

    def __init__(self, kept_tokens: int) -> None:
        super().__init__()
        self.kept_tokens = kept_tokens
        self.seen_tokens = 0

    def get_seq_length(self) -> int:
        """Return the tokens seen, from which models count positions."""
        return self.seen_tokens

    def _joined(
        self, keys: torch.Tensor, values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the tokens kept and new ones `[1, kv_heads, tokens, dim]`, and count these."""
        if not self.is_initialized:
            self.lazy_initialization(keys, values)
        assert self.keys is not None, "made before"
        assert self.values is not None, "made before"
        self.seen_tokens += keys.shape[2]
        return torch.cat((self.keys, keys), dim=2), torch.cat((self.values, values), dim=2)


class SinkLayer(EvictingLayer):
    """A layer that keeps the first tokens and the newest ones (StreamingLLM)."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_args: Any, **_keywords: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Take new tokens; return those that any of them may see, in order."""
        joined = self._joined(key_states, value_states)
        self.keys, self.values = map(self._kept, joined)
        return (self.keys, self.values) if key_states.shape[2] == 1 else joined

    def _kept(self, states: torch.Tensor) -> torch.Tensor:
        tokens = states.shape[2]
        if tokens <= self.kept_tokens:
            return states
        recent = self.kept_tokens - SINK_TOKENS
        return torch.cat((states[:, :, :SINK_TOKENS], states[:, :, tokens - recent :]), dim=2)


class HeavyHitterLayer(EvictingLayer):
    """A layer whose KV heads each keep the tokens they attended most, and the newest (H2O)."""

    def __init__(self, kept_tokens: int) -> None:
        super().__init__(kept_tokens)
        self._attended: torch.Tensor | None = None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_args: Any, **_keywords: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Take new tokens; return all that are held until `settle`, the new ones last."""
        self._evict()  # tokens that were never attended, as where a cache is filled
        self.keys, self.values = self._joined(key_states, value_states)
        return self.keys, self.values

    def settle(self, attended: torch.Tensor) -> None:
        """Add what a pass attended, and drop what is beyond the budget.

        Args:
            attended: sums of the probabilities of all queries `[kv_heads, tokens held]`, float32.
        """
        self._attended = self._sums() + attended
        self._evict()

    def _sums(self) -> torch.Tensor:
        """Return what each token held was attended so far; nothing for those that are new."""
        assert self.keys is not None, "tokens were taken"
        sums = self.keys.new_zeros(self.keys.shape[1:3], dtype=torch.float32)
        if self._attended is not None:
            sums[:, : self._attended.shape[1]] = self._attended
        return sums

    def _evict(self) -> None:
        if self.keys is None or self.values is None or self.keys.ndim < 4:
            return
        tokens = self.keys.shape[2]
        if tokens <= self.kept_tokens:
            return
        heavy = self.kept_tokens // 2
        older = tokens - (self.kept_tokens - heavy)
        sums = self._sums()
        hitters = sums[:, :older].topk(heavy, dim=1).indices.sort(dim=1).values
        recent = torch.arange(older, tokens, device=sums.device).expand(len(sums), -1)
        kept = torch.cat((hitters, recent), dim=1)
        self._attended = sums.gather(1, kept)
        self.keys, self.values = (_taken(states, kept) for states in (self.keys, self.values))


def _taken(states: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """Return some tokens of each KV head."""
    return states.gather(2, kept[None, :, :, None].expand(1, -1, -1, states.shape[3]))


class EvictingCache(DynamicCache):
    """A cache whose layers drop tokens, but for those that have a window of their own.

    Args:
        config: of the model.
        make_layer: makes an empty layer.
        expect: told which layer was given new tokens.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        make_layer: Callable[[], EvictingLayer],
        expect: Callable[[CacheLayerMixin], None],
    ) -> None:
        super().__init__(config=config)
        self.layers: list[CacheLayerMixin] = [
            make_layer() if type(layer) is DynamicLayer else layer for layer in self.layers
        ]
        self._expect = expect

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        layer_idx: int,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Give new tokens to a layer."""
        layer = self.layers[layer_idx]
        keys, values = layer.update(key_states, value_states, *args, **kwargs)
        self._expect(layer)
        return keys, values
