"""One cache's engine: attention of one layer over its past tokens and its new ones.

A layer's call becomes a chunk or several. What the pass of a chunk does is a value (`TrackSteps`).
It says where the new tokens are kept and when, which tokens are fetched, what the host attends, and
what the device attends. The executor performs the steps one after the other.
"""

import torch

from headinfer.attend.masks import Padding
from headinfer.attend.table import Kernels
from headinfer.engine.captured import CapturableTokens
from headinfer.engine.chunk import Chunk
from headinfer.engine.executor import PERFORM
from headinfer.errors import CacheStateError
from headinfer.kv.ledger import Ledger
from headinfer.kv.pair import KV
from headinfer.schedule.route import MAX_ASKED_TOKENS, Pass


class Engine(CapturableTokens):
    """A cache's attention layers: their ledgers, the device arena, and their attention.

    Not safe for use by several threads at once, like the transformers cache it serves. `HeldTokens`
    says what it is made of.

    Attributes:
        sends_late: whether whoever calls the model sends residents home, by `send_late`, when all
            of its kernels are launched or later. Otherwise that is done behind the last layer's
            attention.
    """

    sends_late = False

    @property
    def parts(self) -> "tuple[Engine, ...]":
        """The engines of each device: this one alone; see `PartedEngine`."""
        return (self,)

    def attend(
        self,
        layer_idx: int,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        *,
        kernels: Kernels,
        scale: float,
        window_tokens: int | None = None,
        padding: Padding | None = None,
        sinks: torch.Tensor | None = None,
        host_kernels: Kernels | None = None,
    ) -> torch.Tensor:
        """Attend new tokens to the past and to themselves, and keep them.

        A draft attends the copies that there are for drafts, and is kept beside what is counted.

        Args:
            layer_idx: which layer, counted among those that attend.
            query: `[batch, query_heads, q_len, key_dim]` on the device.
            keys: the new tokens' keys `[batch, kv_heads, q_len, key_dim]`.
            values: their values `[batch, kv_heads, q_len, value_dim]`.
            kernels: what computes partials.
            scale: factor of the scores.
            window_tokens: tokens that each query sees, its own included, of those that the layer
                keeps; None for all of them.
            padding: of past and new tokens. In a layer with a window it is of those that the new
                ones see. None when there is none.
            sinks: scores `[kv_heads, group]` of attention sinks, or None.
            host_kernels: what computes partials on the CPU for a device; None when nothing may.

        Returns:
            `[batch, q_len, query_heads, value_dim]` in the query's dtype, contiguous and newly
            allocated, valid on the compute stream.

        Raises:
            CacheStateError: the cache was closed, or was made for other shapes; or a draft has
                padding before it.
            CaptureError: it is captured, and cannot be.
            Exception: what the host's attention failed with, in this call or in one before.
        """
        new = KV(keys, values)
        layer = self._check(layer_idx, new, query)
        q_len = query.shape[2]
        if q_len <= MAX_ASKED_TOKENS:
            self._host_helps = host_kernels is not None
        if q_len > MAX_ASKED_TOKENS or padding is not None:
            host_kernels = None
        call = Chunk(
            queries=query,
            new=new,
            kernels=kernels,
            scale=scale,
            window_tokens=window_tokens,
            padding=padding,
            sinks=sinks,
            host_kernels=host_kernels,
            tokens=q_len,
        )
        if padding is not None:  # it ends with the new tokens
            call.padding_start = layer.tokens + q_len - padding.valid.shape[1]
        if layer.undivided and self._capturing is None:
            self._attend(layer.tracks[0], call)
            return call.whole if call.result is None else call.result
        chunks = layer.split(call)
        if self._capturing is not None:
            self._attend_captured(layer_idx, chunks)
        else:
            for ledger, chunk in zip(layer.tracks, chunks, strict=True):
                self._attend(ledger, chunk)
        return layer.join(call, chunks)

    def _attend(self, ledger: Ledger, call: Chunk) -> None:
        """Attend new tokens of a track, and keep them."""
        if self.drafting:
            self._draft(ledger, call)
            return
        executor, at_once, q_len = self._executor, self.plan.chunk_tokens, call.tokens
        if ledger.track.window_tokens is not None:
            at_once = max(q_len, 1)
        elif ledger is self._full[0]:  # for all layers alike, because tiles are fetched ahead
            asks = call.host_kernels is not None
            self._balances.tokens = ledger.tokens
            executor.source.host_share = self._balances.at(q_len).share if asks else 0.0
        host_share = 0.0 if call.host_kernels is None else executor.source.host_share
        assert call.window_tokens is None or ledger.track.window_tokens is not None
        executor.ledger = ledger
        if executor.source.begun:
            executor.source.drop()
        try:
            first = 0
            while first < q_len:
                tokens = min(at_once, q_len - first)
                if ledger.track.sink_tokens:
                    tokens = _at_once(ledger, tokens)
                chunk = executor.chunk = call if q_len == tokens else call.part(first, tokens)
                chunk.past_tokens = past = ledger.tokens
                if past < ledger.track.sink_tokens:
                    chunk.window_tokens = None  # what it sees are sinks
                executor.new = chunk.new
                steps = executor.steps_of(ledger, past, Pass.FORWARD, chunk.tokens, host_share)
                for step in steps.steps:
                    PERFORM[type(step)](executor, step)
                if executor.source.begun:
                    executor.source.end()
                first += tokens
        finally:
            executor.release()
        if not self.sends_late:
            self._end_layers(ledger)
        if self._host.pending:
            self._host.check()

    def _draft(self, ledger: Ledger, call: Chunk) -> None:
        """Attend a drafted token of a track, and keep it, whatever is on its way for others."""
        if call.padding is not None:
            raise CacheStateError("nothing is drafted behind padding; pass rows without any")
        executor = self._executor
        executor.ledger, executor.chunk, executor.new = ledger, call, call.new
        call.past_tokens = tokens = ledger.tokens
        try:
            for step in executor.steps_of(ledger, tokens, Pass.DRAFT, call.tokens, 0.0).steps:
                PERFORM[type(step)](executor, step)
        finally:
            executor.release()

    def append(self, layer_idx: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Keep tokens that were computed elsewhere, without attending to anything.

        Args:
            layer_idx: which layer, counted among those that attend.
            keys: `[batch, kv_heads, tokens, key_dim]` on the device; may be freed afterwards.
            values: `[batch, kv_heads, tokens, value_dim]`.

        Raises:
            CacheStateError: the cache was closed, or was made for other shapes.
        """
        new = KV(keys, values)
        layer = self._check(layer_idx, new, keys)
        for ledger, part in zip(layer.tracks, layer.split_new(new), strict=True):
            self._append(ledger, part)

    def _append(self, ledger: Ledger, new: KV) -> None:
        """Keep tokens of a track."""
        executor, at_once = self._executor, self.plan.chunk_tokens
        executor.ledger = ledger
        if ledger.track.window_tokens is not None:
            at_once = max(new.tokens, 1)
        try:
            first = 0
            while first < new.tokens:
                tokens = _at_once(ledger, min(at_once, new.tokens - first))
                executor.new = new.cut(slice(first, first + tokens))
                steps = executor.steps_of(ledger, ledger.tokens, Pass.APPEND, tokens, 0.0)
                for step in steps.steps:
                    PERFORM[type(step)](executor, step)
                first += tokens
        finally:
            executor.release()
        if not self.sends_late:
            self._end_layers(ledger)

    def _end_layers(self, ledger: Ledger) -> None:
        """Send home what layers have left to the last of them."""
        if self._full and ledger is self._full[-1]:
            self._executor.send_late()

    def send_late(self) -> None:
        """Send home the residents of a pass that the host lacks; see `sends_late`.

        Raises:
            MemoryPlanError: the host memory cannot be had. They stay where they are.
        """
        self._executor.send_late()


def _at_once(ledger: Ledger, new_tokens: int) -> int:
    """Return how many of some new tokens pass at once: sinks are a part of their own."""
    left = ledger.track.sink_tokens - ledger.tokens
    return min(new_tokens, left) if left > 0 else new_tokens
