"""The cache a user passes to the model: transformers' own, with offloaded layers in it."""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import CacheLayerMixin, DynamicCache

from headinfer.engine.engine import Engine
from headinfer.errors import CacheStateError
from headinfer.integration.attention import AttentionFunctions, Pending
from headinfer.integration.support import layer_kind
from headinfer.plan.host_room import HostRoom
from headinfer.plan.plan import Plan
from headinfer.plan.shape import LayerKind
from headinfer.units import format_tokens

_GROWTH_DIVISOR, _LEAST_GROWTH_TOKENS = 4, 1024
"""A cache is planned for a quarter more than it is known to hold, or so many tokens: an answer and
the next turns follow, and where all tokens are resident another plan brings them back over the
link."""


def _with_growth(tokens: int) -> int:
    return tokens + max(tokens // _GROWTH_DIVISOR, _LEAST_GROWTH_TOKENS)


def _outgrows(plan: Plan, tokens: int) -> bool:
    """Whether a plan kept all tokens it knew of on the device, and there are more now."""
    return 0 < (plan.context_tokens or 0) <= plan.resident_tokens < tokens


class CacheHost(Protocol):
    """What a cache needs of the attachment it belongs to."""

    @property
    def functions(self) -> AttentionFunctions:
        """The attention functions that take what is pending."""

    def plan_for(self, batch: int, context_tokens: int, *, replacing: Engine | None = None) -> Plan:
        """Return the plan for a cache, in place of the one its engine has, or refuse."""

    def make_engine(self, plan: Plan) -> Engine:
        """Return an engine with its arena allocated."""

    def host_room(self, working_bytes: int) -> HostRoom:
        """Return what of host memory is left for a cache whose calls need some to compute with."""


class OffloadedState:
    """The engine behind a cache's offloaded layers; made when the first tokens come.

    The layers refer to this and never to the cache, so that dropping the cache frees its memory at
    once, without waiting for the garbage collector.
    """

    def __init__(self, host: CacheHost, max_tokens: int | None, *, has_layers: bool) -> None:
        self.host = host
        self._has_layers = has_layers  # a model may have sliding windows only
        self.engine: Engine | None = None
        self.closed = False
        self._max_tokens = max_tokens

    def tokens(self, layer_idx: int) -> int:
        """Return the tokens an offloaded layer holds."""
        return self.engine.tokens(layer_idx) if self.engine else 0

    @property
    def chunk_tokens(self) -> int | None:
        """Tokens of a prefill chunk; None while there is no engine."""
        return self.engine.plan.chunk_tokens if self.engine else None

    def prepare(self, batch: int, new_tokens: int) -> None:
        """Make the engine for the first tokens; make sure of host memory for these and the rest.

        Args:
            batch: rows.
            new_tokens: tokens to come in each row, in this call of the model.

        Raises:
            CacheStateError: the cache was closed, or holds another number of rows.
            MemoryPlanError: the device or the host memory is too small.
        """
        if self.closed:
            raise CacheStateError("this cache was closed; make another with offload.new_cache()")
        if not self._has_layers:
            return
        held = self.tokens(0)
        wanted = max(held + new_tokens, self._max_tokens or 0)
        if self.engine is not None and self.engine.plan.batch != batch:
            if held:
                raise CacheStateError(
                    f"this cache holds {self.engine.plan.batch} rows and was given {batch}; "
                    "use a new cache"
                )
            self.engine.close()
            self.engine = None
        if self.engine is None:
            known = self._max_tokens is not None
            plan = self.host.plan_for(batch, wanted if known else _with_growth(wanted))
            self._check_host(plan.kv_host_bytes(wanted), wanted, plan)
            self.engine = self.host.make_engine(plan)
            self.engine.expect(wanted)
            return
        if (more := self.engine.expect(wanted)) > 0:
            self._check_host(more, wanted)
        if _outgrows(self.engine.plan, wanted):
            plan = self.host.plan_for(batch, _with_growth(wanted), replacing=self.engine)
            self.engine.replan(plan)

    def _check_host(self, needed_bytes: int, tokens: int, first: Plan | None = None) -> None:
        """Refuse what host memory has no room for; `first` is the plan of an engine to be made."""
        working_bytes = first.arena_bytes if first is not None else 0
        plan = first or (self.engine.plan if self.engine else None)
        if plan is not None:
            working_bytes += plan.activation_bytes
        room = self.host.host_room(working_bytes)
        room.check(needed_bytes, f"the KV cache of {format_tokens(tokens)} tokens")

    def update(
        self, layer_idx: int, keys: torch.Tensor, values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Take new tokens and hand them back for the attention call that follows."""
        if self.engine is None:  # the model was not called through its own forward
            self.prepare(keys.shape[0], keys.shape[2])
        assert self.engine is not None
        self.host.functions.expect(Pending(self.engine, layer_idx, keys, values))
        return keys, values

    def select_rows(self, rows: Sequence[int]) -> None:
        """Make row `i` of every layer what row `rows[i]` was; the number of rows may change."""
        if self.engine is not None and self.tokens(0):
            tokens = max(self.tokens(0), self._max_tokens or 0)
            plan = self.host.plan_for(len(rows), tokens, replacing=self.engine)
            self._check_host(plan.kv_host_bytes(tokens) - self.engine.host_kv_bytes, tokens)
            self.engine.select_all(rows, plan)

    def close(self) -> None:
        """Free all memory; the cache cannot be used any more."""
        self.closed = True
        if self.engine is not None:
            self.engine.close()
            self.engine = None


class OffloadedLayer(CacheLayerMixin):
    """One full-attention layer of an `OffloadedCache`; `keys` and `values` stay None."""

    is_sliding = False
    is_compileable = False
    is_croppable = True
    supports_early_init = False

    def __init__(self, state: OffloadedState, layer_idx: int) -> None:
        super().__init__()
        self.is_initialized = True
        self._state = state
        self._layer_idx = layer_idx

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Do nothing: the engine is made when tokens come."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_args: Any, **_kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Take new tokens; returns them alone, for the attention function to find the rest."""
        return self._state.update(self._layer_idx, key_states, value_states)

    def get_seq_length(self) -> int:
        """Return the tokens held."""
        return self._state.tokens(self._layer_idx)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the keys a mask covers and the first of them."""
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        """Return -1: there is no limit."""
        return -1

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the newest `-tokens_to_remove` tokens.

        Raises:
            ValueError: a positive number, which older transformers took as the length to keep.
        """
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes minus the tokens to remove, not {tokens_to_remove}")
        if self._state.engine is not None and tokens_to_remove:
            self._state.engine.crop(self._layer_idx, -tokens_to_remove)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Rearrange the rows for beam search."""
        if self._state.engine is not None and self.get_seq_length():
            self._state.engine.select(self._layer_idx, beam_idx.tolist())

    def reset(self) -> None:
        """Forget all tokens; the first offloaded layer does it for all."""
        if self._layer_idx == 0 and self._state.engine is not None:
            self._state.engine.clear()

    def offload(self) -> None:
        """Do nothing: the layer is offloaded by its own means."""

    def prefetch(self) -> None:
        """Do nothing: the layer is prefetched by its own means."""


class OffloadedCache(DynamicCache):
    """A transformers cache whose full-attention layers live in host memory, head by head.

    Sliding-window layers and linear-attention layers are transformers' own. Made by
    `Offload.new_cache`; valid for one conversation at a time, on the model it was made for.

    Args:
        model: gives the layers.
        host: the attachment.
        max_tokens: tokens to reserve host memory for; None to go by the prompts.
    """

    def __init__(self, model: PreTrainedModel, host: CacheHost, max_tokens: int | None) -> None:
        super().__init__(config=model.config)
        self._config = model.config
        self._lengths_before: list[int] | None = None  # while a model call is under way
        full = [
            position
            for position, layer in enumerate(self.layers)
            if layer_kind(layer) is LayerKind.FULL
        ]
        self.state = OffloadedState(host, max_tokens, has_layers=bool(full))
        for layer_idx, position in enumerate(full):
            self.layers[position] = OffloadedLayer(self.state, layer_idx)

    def _lengths(self) -> list[int]:
        return [
            layer.get_seq_length() for layer in self.layers if isinstance(layer, CacheLayerMixin)
        ]

    def begin_call(self) -> None:
        """Note the state before a model call.

        Raises:
            CacheStateError: the call before was interrupted half-way, so that some layers hold
                tokens which others lack.
        """
        lengths = self._lengths()
        stateful = len(lengths) < len(self.layers)  # linear attention: nothing tells it advanced
        if self._lengths_before is not None and (stateful or self._lengths_before != lengths):
            raise CacheStateError(
                "a call of the model with this cache was interrupted, so its layers no longer hold "
                "the same tokens; call reset() on it or use a new cache"
            )
        self._lengths_before = lengths

    def end_call(self) -> None:
        """Note that the call went through all layers."""
        self._lengths_before = None

    def reset(self) -> None:
        """Forget all tokens."""
        self._lengths_before = None
        # Made anew, because older transformers zero a window and then go on behind the zeros.
        fresh = DynamicCache(config=self._config).layers
        for position, layer in enumerate(self.layers):
            if isinstance(layer, OffloadedLayer):
                layer.reset()
            else:
                self.layers[position] = fresh[position]

    def shrink_windows(self) -> None:
        """Let sliding layers that record their past, for speculative decoding, drop it."""
        for layer in self._own_layers():
            if getattr(layer, "is_sliding", False) and getattr(layer, "record_past", False):
                layer.crop(0)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row."""
        batch = self.state.engine.plan.batch if self.state.engine else 1
        self.state.select_rows([row for row in range(batch) for _ in range(repeats)])
        for layer in self._own_layers():
            layer.batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep some rows."""
        if self.state.engine is not None:
            rows = torch.arange(self.state.engine.plan.batch)[indices.cpu()]
            self.state.select_rows(rows.tolist())
        for layer in self._own_layers():
            layer.batch_select_indices(indices)

    def _own_layers(self) -> list[Any]:
        return [layer for layer in self.layers if not isinstance(layer, OffloadedLayer)]

    def close(self) -> None:
        """Free host and device memory now; the cache cannot be used any more."""
        self.state.close()
