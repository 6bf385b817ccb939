"""StreamingLLM (arXiv 2309.17453) and H2O (arXiv 2306.14048) as methods of the benchmarks.

Layers with a window of their own keep that, and drop nothing else. Each class says where it differs
from its authors' code.
"""

from abc import abstractmethod
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin

from headinfer.bench.evicting.attention import Call, InConfig
from headinfer.bench.evicting.layers import (
    SINK_TOKENS,
    EvictingCache,
    EvictingLayer,
    HeavyHitterLayer,
    SinkLayer,
)
from headinfer.bench.evicting.turning import Turning
from headinfer.bench.spec import TrialSpec
from headinfer.bench.stock import Standard
from headinfer.errors import OptionError, UnsupportedModelError
from headinfer.integration.calls import last_logits
from headinfer.integration.recurrence import has_state
from headinfer.integration.rotary import rotary_modules_by_length
from headinfer.integration.support import check_supported, layer_index

HALF = 0.5
"""Share of the tokens that are kept, where nothing else is asked for."""


class Evicting(Standard):
    """A cache that drops tokens, on a stock model whose attention is that of `Call`.

    Args:
        model: stock; its config names another attention until `close`.
        spec: of the trial.
        kept_share: share of the tokens that a cache is made for, prompt and answers, that it keeps.
        kept_tokens: how many it keeps, whatever it is made for.

    Raises:
        OptionError: less is to be kept than the method needs.
        UnsupportedModelError: the model's attention cannot be replaced, or not pass by pass.
    """

    least_tokens: int
    """The fewest tokens that a cache can keep."""

    pass_tokens_by_default: int
    """Tokens of a pass where the settings leave them open."""

    def __init__(
        self,
        model: PreTrainedModel,
        spec: TrialSpec,
        *,
        kept_share: float = HALF,
        kept_tokens: int | None = None,
    ) -> None:
        super().__init__(model, spec)
        if kept_tokens is not None and kept_tokens < self.least_tokens:
            raise OptionError(f"at least {self.least_tokens} tokens are kept, not {kept_tokens}")
        if not 0 < kept_share <= 1:
            raise OptionError(
                f"the share of tokens kept is above 0 and at most 1, not {kept_share}"
            )
        _check(model)
        self._kept_share, self._kept_tokens = kept_share, kept_tokens
        given = spec.settings.chunk_tokens
        self._pass_tokens = self.pass_tokens_by_default if given == "auto" else given
        kept = f"{kept_share:.0%} of the" if kept_tokens is None else f"{kept_tokens:,}"
        told = f"keeps {kept} tokens; passes of {self._pass_tokens:,}"
        self.note = "; ".join(filter(None, (self.note, told)))
        self._updated: CacheLayerMixin | None = None
        self._prepare()
        self._in_config = InConfig(model, self._attend)

    def _prepare(self) -> None:
        """Learn of the model what attending takes, while it is stock."""

    def new_cache(self, max_tokens: int) -> Cache:
        """Return an empty cache that keeps a share of `max_tokens`."""
        kept = self._kept_tokens
        if kept is None:
            kept = max(self.least_tokens, int(self._kept_share * max_tokens))

        def expect(layer: CacheLayerMixin) -> None:
            self._updated = layer

        return EvictingCache(self._model.config, lambda: self._layer(kept), expect)

    def pass_tokens(self, context_tokens: int) -> int:
        """Return the tokens of a pass."""
        return min(self._pass_tokens, context_tokens)

    def prefill(self, tokens: torch.Tensor, cache: Cache) -> torch.Tensor:
        """Pass a prompt through the model, pass by pass."""
        *before, last = tokens.split(self._pass_tokens, dim=1)
        for part in before:
            last_logits(self._model, part, cache)
        return last_logits(self._model, last, cache)

    def sizes(self, cache: Cache) -> dict[str, int] | None:
        """Return the tokens of a pass and those kept."""
        kept = [layer.kept_tokens for layer in cache.layers if isinstance(layer, EvictingLayer)]
        return {"chunk_tokens": self._pass_tokens, "kept_tokens": max(kept, default=0)}

    def close(self) -> None:
        """Leave the model as it was."""
        self._in_config.remove()

    def _attend(
        self, module: Any, query: torch.Tensor, *given: Any, **keywords: Any
    ) -> tuple[torch.Tensor, None]:
        """Serve one layer's attention; the signature is the registry's."""
        updated, self._updated = self._updated, None
        call = Call.of(query, *given, **keywords)
        if not isinstance(updated, EvictingLayer):
            return call.attend(call.seen()), None
        if call.window_tokens is not None:
            raise UnsupportedModelError(
                f"{type(module).__name__} has a window in its mask alone: not served"
            )
        return self._attend_layer(layer_index(module), updated, call), None

    @abstractmethod
    def _layer(self, kept_tokens: int) -> EvictingLayer:
        """Return an empty layer of the method's."""

    @abstractmethod
    def _attend_layer(self, number: int, layer: Any, call: Call) -> torch.Tensor:
        """Attend what a layer keeps and the new tokens, which it was given before."""


def _check(model: PreTrainedModel) -> None:
    """Check that a model's attention can be replaced, and its prompts cut into passes.

    Raises:
        UnsupportedModelError: says what is in the way.
    """
    check_supported(model)
    name = type(model).__name__
    if has_state(model):
        raise UnsupportedModelError(
            f"{name} keeps a recurrent state, of which no token can be dropped"
        )
    if rotary_modules_by_length(model):
        raise UnsupportedModelError(
            f"{name} has rotary frequencies that follow the length of a call: not served in passes"
        )


class StreamingLLM(Evicting):
    """A cache of a few first tokens and the newest ones, in all layers and heads alike.

    Positions are those within the cache, as published. There keys are kept as they are before they
    are turned, and turned anew for each query. Here keys stay as the model turned them: recent ones
    have the distance to their query that they have in the text. The first ones meet queries that
    are turned back. The scores are the same, and no key is rounded twice.

    Each query sees the cache as it is when tokens come one by one, itself included. So results do
    not depend on the size of passes.
    """

    least_tokens = SINK_TOKENS + 1
    pass_tokens_by_default = 512

    def _prepare(self) -> None:
        self._turning = Turning(self._model)

    def _layer(self, kept_tokens: int) -> SinkLayer:
        return SinkLayer(kept_tokens)

    def _attend_layer(self, number: int, layer: SinkLayer, call: Call) -> torch.Tensor:
        q_len, kv_len = call.query.shape[2], call.keys.shape[1]
        if layer.seen_tokens <= layer.kept_tokens:
            return call.attend(call.seen())
        places = torch.arange(layer.seen_tokens, device=call.keys.device)
        queries, keys = places[layer.seen_tokens - q_len :], places[layer.seen_tokens - kv_len :]
        steps = (queries - (layer.kept_tokens - 1)).clamp(min=0)
        turned = self._turning.back(number, call.query.flatten(0, 1), steps)
        turned = turned.unflatten(0, call.query.shape[:2])
        recent = layer.kept_tokens - SINK_TOKENS
        near = keys > queries[:, None] - recent
        near[:, :SINK_TOKENS] = True
        return call.attend(call.seen() & near, turned=turned, turned_keys=SINK_TOKENS)


class H2O(Evicting):
    """A cache of the tokens that got the most attention, and of as many of the newest ones.

    Each KV head keeps tokens of its own. What a token was attended is the sum of its probabilities
    over all queries since it came, as published. Positions stay those of the text, as in the
    authors' evaluation by masks.

    Two things differ. Tokens are dropped after each pass, and not after each token: passes are
    short, and a pass of one token is the published algorithm. The published models have a query
    head for each KV head. Here the sums of all query heads of a group are added.
    """

    least_tokens = 2
    pass_tokens_by_default = 128

    def _layer(self, kept_tokens: int) -> HeavyHitterLayer:
        return HeavyHitterLayer(kept_tokens)

    def _attend_layer(self, number: int, layer: HeavyHitterLayer, call: Call) -> torch.Tensor:
        sums = call.keys.new_zeros(call.keys.shape[:2], dtype=torch.float32)
        out = call.attend(call.seen(), tell=lambda each: sums.add_(each.sum(dim=(1, 2))))
        layer.settle(sums)
        return out
