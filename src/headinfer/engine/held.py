"""What the offloaded layers of one cache hold, where it is, and how long.

Everything here happens between a layer's calls: what changes or frees stored tokens first waits
for the work in flight that touches them.
"""

import dataclasses
import math
import sys
from collections.abc import Callable, Sequence

import torch

from headinfer.device.base import Device, Edge
from headinfer.engine.build import build
from headinfer.engine.ending import settle_at_exit, uninterrupted
from headinfer.engine.host_attention import Balance, HostAttention
from headinfer.engine.readout import Part, copy_into, part_shape, read
from headinfer.engine.stats import Stats
from headinfer.engine.tiles import StoredLayer
from headinfer.errors import CacheStateError
from headinfer.plan.plan import Plan
from headinfer.store.layer import KVGeometry, LayerStore


class HeldTokens:
    """The tokens of one cache's offloaded layers: their stores and the device arena.

    Args:
        device: where attention is computed.
        plan: sizes; its batch must be the batch of the tokens that come.
        dtype: of keys and values.
        stats: where bytes are counted.

    Attributes:
        plan: as given.
        dtype: as given.
        closed: whether the memory was given back.
    """

    def __init__(self, device: Device, plan: Plan, dtype: torch.dtype, stats: Stats) -> None:
        self.plan = plan
        self.dtype = dtype
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
        settle_at_exit(self)

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

    def read_bytes(self, layer_idx: int, part: Part) -> int:
        """Return the bytes that `read` takes."""
        layer = self._layers[layer_idx]
        shape = part_shape(layer, self.tokens(layer_idx), part)
        return math.prod(shape) * layer.store.geometry.dtype.itemsize

    def read(self, layer_idx: int, part: Part) -> torch.Tensor:
        """Return a copy of a layer's keys or values, `[batch, kv_heads, tokens, dim]`.

        Returns:
            New memory on the device, which the caller owns. What was fetched ahead is forgotten.
        """
        self._come_to_rest()
        tail = self._writer.tail(layer_idx)
        return read(self._device, self._layers[layer_idx], tail, part)

    def copy_from(self, other: "HeldTokens") -> None:
        """Hold what another engine of the same device and rows holds; this one must be empty.

        Raises:
            MemoryPlanError: the host memory cannot be had; close this engine then.
        """
        other._come_to_rest()
        for layer_idx, (layer, source) in enumerate(zip(self._layers, other._layers, strict=True)):
            layer.store.reserve(self._expected_tokens)
            copy_into(self._device, layer.store, source, other._writer.tail(layer_idx))
        self._fill_residents()

    def _come_to_rest(self) -> None:
        self._check_open()
        self._settle()
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
        self._come_to_rest()
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
        try:
            del self._source, self._writer
            self._host.free()
            self._build()
        except BaseException:
            self._abandon()
            raise
        self._fill_residents()

    def _fill_residents(self) -> None:
        """Fetch what the plan keeps on the device; every token must be in the stores, at rest."""
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

    def __del__(self, _is_finalizing: Callable[[], bool] = sys.is_finalizing) -> None:
        """Wait for the work in flight before the memory it touches goes away."""
        if not _is_finalizing():  # else `settle_at_exit` did
            uninterrupted(self.settle)

    def settle(self) -> None:
        """Wait until no work touches the memory; may be called again, and when closed."""
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
