"""One cache's engine: attention of one layer over its past tiles and its new tokens.

The life of a layer's call: room is made for the new tokens; then, for each group of heads, the
chunk is attended to itself, to what is on the device, and to each stored tile as it arrives; in a
decode step the host attends its share meanwhile; the partials merge by LSE; at last the new tokens
go to the store. A single token where all before it are resident takes one call of the kernel.
"""

import dataclasses
from collections.abc import Sequence

import torch

from headinfer.attend.masks import Padding
from headinfer.attend.partial import Kernel, Partial
from headinfer.device.base import Device, Edge
from headinfer.engine.build import build
from headinfer.engine.chunk import Chunk, attention_mark
from headinfer.engine.host_attention import MAX_QUERY_TOKENS, Balance, HostAttention
from headinfer.engine.stats import Stats
from headinfer.engine.tiles import StoredLayer, head_groups
from headinfer.errors import CacheStateError
from headinfer.plan.plan import Plan
from headinfer.store.layer import KVGeometry, LayerStore


class Engine:
    """The offloaded layers of one cache: their stores, the device arena, and their attention.

    Not safe for use by several threads at once, like the transformers cache it serves.

    Args:
        device: where attention is computed.
        plan: sizes; its batch must be the batch of the tokens that come.
        dtype: of keys and values.
        stats: where bytes are counted.

    Attributes:
        plan: as given.
        closed: whether the memory was given back.
    """

    def __init__(self, device: Device, plan: Plan, dtype: torch.dtype, stats: Stats) -> None:
        self.plan = plan
        self.closed = False
        self._device = device
        self._stats = stats
        self._expected_tokens = 0
        self._layers = [
            StoredLayer(
                LayerStore(
                    device,
                    KVGeometry(plan.batch, layer.kv_heads, layer.key_dim, layer.value_dim, dtype),
                )
            )
            for layer in plan.shape.full_layers
        ]
        self._arena_bytes = 0
        self._build()

    def _build(self) -> None:
        """Take what the plan gives the engine."""
        fixed = not self.plan.host_share_adapts
        if fixed or not hasattr(self, "_balance"):  # else what was learned is kept
            self._balance = Balance(self.plan.host_share, fixed=fixed)
        self._host = HostAttention(self._device, self._stats, self._balance)
        self._source, self._writer, self._arena_bytes = build(
            self._device, self.plan, self._layers, self._stats
        )

    @property
    def device_kv_bytes(self) -> int:
        """Bytes of device memory held for KV."""
        return self._arena_bytes

    @property
    def host_kv_bytes(self) -> int:
        """Bytes of host memory held for KV."""
        return sum(layer.store.num_bytes for layer in self._layers)

    @property
    def unwritten_host_bytes(self) -> int:
        """Bytes of those that were never written, which the system may not have given yet."""
        return sum(layer.store.unwritten_bytes for layer in self._layers)

    def tokens(self, layer_idx: int) -> int:
        """Return the tokens a layer holds."""
        self._check_open()
        return self._layers[layer_idx].store.tokens + self._writer.tail_tokens(layer_idx)

    def expect(self, tokens: int) -> int:
        """State that a layer will come to hold `tokens` tokens; its store is reserved when it does.

        Returns:
            The bytes of host memory that this adds to what is held.
        """
        self._expected_tokens = max(self._expected_tokens, tokens)
        return sum(
            layer.store.geometry.num_bytes(layer.store.missing_tokens(tokens))
            for layer in self._layers
        )

    def attend(
        self,
        layer_idx: int,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        *,
        kernel: Kernel,
        scale: float,
        padding: Padding | None = None,
        sinks: torch.Tensor | None = None,
        host_kernel: Kernel | None = None,
    ) -> torch.Tensor:
        """Attend new tokens to the past and to themselves, and keep them.

        Args:
            layer_idx: which offloaded layer, counted among these.
            query: `[batch, kv_heads, group, q_len, key_dim]` on the device.
            keys: the new tokens' keys `[batch, kv_heads, q_len, key_dim]`.
            values: their values `[batch, kv_heads, q_len, value_dim]`.
            kernel: what computes partials.
            scale: factor of the scores.
            padding: of all tokens, past and new; None when there is none.
            sinks: scores `[kv_heads, group]` of attention sinks, or None.
            host_kernel: what computes partials on the CPU for a device; None when nothing may.

        Returns:
            `[batch, q_len, kv_heads, group, value_dim]` in the query's dtype, newly allocated,
            valid on the compute stream.

        Raises:
            CacheStateError: the cache was closed, or was made for other shapes.
            Exception: what the host's attention failed with, in this call or in one before.
        """
        geometry = self._check(layer_idx, keys, values, query)
        batch, kv_heads, group, q_len, _ = query.shape
        out = query.new_empty(batch, q_len, kv_heads, group, geometry.value_dim)
        self._layers[layer_idx].store.reserve(self._expected_tokens)
        if q_len > MAX_QUERY_TOKENS or padding is not None:
            host_kernel = None
        call = Chunk(
            query=query,
            keys=keys,
            values=values,
            out=out,
            kernel=kernel,
            scale=scale,
            padding=padding,
            sinks=sinks,
        )
        if q_len == 1 and padding is None and sinks is None and self._decode(layer_idx, call):
            return out
        for first in range(0, q_len, self.plan.chunk_tokens):
            part = slice(first, first + self.plan.chunk_tokens)
            chunk = call if q_len <= self.plan.chunk_tokens else call.part(part)
            self._attend_chunk(layer_idx, chunk, host_kernel)
        self._host.check()
        return out

    def _decode(self, layer_idx: int, token: Chunk) -> bool:
        """Attend and keep a single token in one call of the kernel, where all others are resident.

        Returns:
            Whether they are; nothing was done if not.
        """
        past = self._writer.extend(layer_idx)
        if past is None:
            return False
        new, old = (token.keys, token.values), (past.keys, past.values)
        try:
            with attention_mark():
                token.kernel.decode(token.query, new, old, token.out, scale=token.scale)
        except BaseException:
            self._writer.crop(layer_idx, 1)  # its place may never have been written
            raise
        self._writer.commit(layer_idx, token.keys, token.values)
        self._source.skip(layer_idx)
        return True

    def append(self, layer_idx: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Keep tokens that were computed elsewhere, without attending to anything.

        Args:
            layer_idx: which offloaded layer, counted among these.
            keys: `[batch, kv_heads, tokens, key_dim]` on the device; may be freed afterwards.
            values: `[batch, kv_heads, tokens, value_dim]`.

        Raises:
            CacheStateError: the cache was closed, or was made for other shapes.
        """
        self._check(layer_idx, keys, values)
        self._layers[layer_idx].store.reserve(self._expected_tokens)
        for first in range(0, keys.shape[2], self.plan.chunk_tokens):
            part = slice(first, first + self.plan.chunk_tokens)
            new_keys, new_values = keys[:, :, part], values[:, :, part]
            self._writer.make_room(layer_idx, new_keys.shape[2])
            self._writer.admit(layer_idx, new_keys, new_values)
            self._writer.commit(layer_idx, new_keys, new_values)

    def _attend_chunk(self, layer_idx: int, chunk: Chunk, host_kernel: Kernel | None) -> None:
        """Attend at most `plan.chunk_tokens` new tokens, and keep them."""
        layer, kv_heads = self._layers[layer_idx], chunk.keys.shape[1]
        past_tokens = self.tokens(layer_idx)
        self._writer.make_room(layer_idx, chunk.tokens)
        near = self._writer.admit(layer_idx, chunk.keys, chunk.values)
        self._share_with_host(layer_idx, 0.0 if host_kernel is None else self._balance.share)
        first, end = layer.streamed
        if end == layer.store.tokens:
            host_kernel = None  # nothing is left to the host
        if host_kernel is not None:
            self._host.ask(layer, chunk.query, host_kernel, scale=chunk.scale)
        self._source.begin(layer_idx)
        # What is not streamed is on the device for all heads, and few tokens need no groups.
        in_groups = first < end or chunk.tokens > self.plan.page_tokens
        waiting = []
        for heads in head_groups(kv_heads, self.plan.tile_heads if in_groups else kv_heads):
            total = chunk.attend(heads, near, self._source.tiles(heads), past_tokens)
            if host_kernel is not None:
                waiting.append((heads, total))
            else:
                chunk.finish(heads, total)
        if waiting:
            answer = self._host.answer()
            for heads, total in waiting:
                total.add(Partial(answer.out[:, heads], answer.lse[:, heads]))
                chunk.finish(heads, total)
        self._writer.commit(layer_idx, chunk.keys, chunk.values)
        self._source.end()

    def _share_with_host(self, layer_idx: int, share: float) -> None:
        """Set the host's share: in all layers at the first, because tiles are fetched ahead."""
        if layer_idx == 0:
            for layer in self._layers:
                layer.host_share = share
        elif not share:
            self._layers[layer_idx].host_share = 0.0

    def _check(self, layer_idx: int, *parts: torch.Tensor) -> KVGeometry:
        """Refuse keys, values and, where there is one, a query that do not fit the cache."""
        self._check_open()
        geometry = self._layers[layer_idx].store.geometry
        keys, values = parts[:2]
        given = (keys.shape[0], keys.shape[1], keys.shape[3], values.shape[3])
        wanted = (geometry.batch, geometry.kv_heads, geometry.key_dim, geometry.value_dim)
        if given != wanted or any(part.dtype != geometry.dtype for part in parts):
            names = ", ".join(sorted({str(part.dtype) for part in parts}))
            raise CacheStateError(
                f"layer {layer_idx} was given keys and values of (batch, kv_heads, key_dim, "
                f"value_dim) {given} in {names}, but this cache holds {wanted} in "
                f"{geometry.dtype}; use a new cache"
            )
        return geometry

    def check(self) -> None:
        """Raise what the host's attention failed with since the last check.

        Work that is pending is not looked at: what compute has done is sound if compute was waited
        for before this.
        """
        self._host.check()

    def _check_open(self) -> None:
        if self.closed:
            raise CacheStateError("this cache was closed; make another with offload.new_cache()")
        self._host.check()

    def crop(self, layer_idx: int, tokens: int) -> None:
        """Remove a layer's newest `tokens` tokens, or all it has."""
        self._check_open()
        rest = tokens - self._writer.crop(layer_idx, tokens)
        if rest > 0:
            self._settle()
            self._host.check()
            layer = self._layers[layer_idx]
            layer.store.crop(max(layer.store.tokens - rest, 0))
            if layer.resident is not None:
                layer.resident.crop(layer.store.tokens)

    def select(self, layer_idx: int, rows: Sequence[int]) -> None:
        """Make row `i` of a layer what row `rows[i]` was, for as many rows as the plan has."""
        self._check_open()
        assert len(rows) == self.plan.batch
        if list(rows) == list(range(self.plan.batch)):
            return
        self._settle()
        self._host.check()
        self._writer.select(layer_idx, rows)
        layer = self._layers[layer_idx]
        layer.store.select(rows)
        if layer.resident is not None:
            layer.resident.select(rows)

    def select_all(self, rows: Sequence[int], plan: Plan) -> None:
        """Make row `i` of every layer what row `rows[i]` was, under a plan for that many rows."""
        self._bring_home()
        for layer in self._layers:
            layer.store.select(rows)
        self._rebuild(plan)

    def replan(self, plan: Plan) -> None:
        """Go on under another plan for as many rows, with what it keeps on the device."""
        self._bring_home()
        self._rebuild(plan)

    def give_up_residents(self) -> None:
        """Keep no token on the device; costs no copy but the decode tail's."""
        self.replan(dataclasses.replace(self.plan, resident_tokens=0, resident_bytes=0))

    def _bring_home(self) -> None:
        """Put every token into the stores, at rest."""
        self._check_open()
        for layer_idx in range(len(self._layers)):
            self._writer.flush(layer_idx)
        self._settle()
        self._host.check()

    def _rebuild(self, plan: Plan) -> None:
        """Take the memory of another plan; every token must be in the stores, at rest."""
        self.plan = plan
        # The old arena goes before the new one comes: both together would exceed either plan.
        for layer in self._layers:
            layer.written = layer.resident = None
        del self._source, self._writer
        self._host.free()
        try:
            self._build()
        except BaseException:
            self._abandon()
            raise
        for layer in self._layers:
            if layer.resident is not None:
                layer.resident.fill(layer.store)
                fetched = layer.store.geometry.num_bytes(layer.resident.tokens)
                self._stats.bytes_to_device += fetched

    def clear(self) -> None:
        """Forget all tokens and free the host memory; the arena stays.

        Raises:
            Exception: what the host's attention failed with, and nobody heard of; after all else.
        """
        if not self.closed:
            self._settle()
            self._empty()
        self._check_open()

    def _empty(self) -> None:
        """Forget all tokens, with no work in flight."""
        for layer_idx, layer in enumerate(self._layers):
            self._writer.crop(layer_idx, self._writer.tail_tokens(layer_idx))
            layer.store.clear()
            layer.written = None
            if layer.resident is not None:
                layer.resident.crop(0)
        self._expected_tokens = 0

    def close(self) -> None:
        """Free all memory, once no copy touches it any more; may be called again.

        Raises:
            Exception: what the host's attention failed with, and nobody heard of; after all else.
        """
        if self.closed:
            return
        self._settle()
        self._empty()
        del self._source, self._writer
        self._abandon()
        self._host.check()

    def _abandon(self) -> None:
        """Free what is left, with no copy in flight; the cache is closed after this."""
        self.closed = True
        self._arena_bytes = 0
        self._host.free()
        for layer in self._layers:
            layer.resident = None
            layer.store.clear()

    def __del__(self) -> None:
        """Wait for the work in flight before the memory it touches goes away."""
        if hasattr(self, "_source"):
            self._settle()
            self._host.free()

    def _settle(self) -> None:
        """Wait on the host until no work touches the stores, and forget what was fetched ahead."""
        if self._device.tiles_are_views:
            return
        for stream in (self._device.copy_in, self._device.copy_out, self._device.host_work):
            stream.record().synchronize(Edge.HOST_SETTLED)
        self._host.forget()
        self._source.drop()
