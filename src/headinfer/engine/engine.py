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
from headinfer.engine.tiles import head_groups
from headinfer.engine.windows import WindowKeeper
from headinfer.errors import CacheStateError
from headinfer.kv.ledger import Ledger
from headinfer.kv.pair import KV, Geometry
from headinfer.kv.place import HostPlace
from headinfer.plan.plan import Plan


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
        host = HostPlace(device)
        self._ledgers = [
            Ledger(
                Geometry(plan.batch, layer.kv_heads, layer.key_dim, layer.value_dim, dtype),
                host,
                layer.window_tokens or None,
            )
            for layer in plan.shape.attention_layers
        ]
        self._full = [ledger for ledger in self._ledgers if ledger.window_tokens is None]
        self._windows = WindowKeeper(device, plan.page_tokens)
        self._arena_bytes = 0
        self._build()

    def _build(self) -> None:
        """Take what the plan gives the engine."""
        fixed = not self.plan.host_share_adapts
        if fixed or not hasattr(self, "_balance"):  # else what was learned is kept
            self._balance = Balance(self.plan.host_share, fixed=fixed)
        self._host = HostAttention(self._device, self._stats, self._balance)
        self._source, self._keeper, self._arena_bytes = build(
            self._device, self.plan, self._full, self._stats
        )

    @property
    def device_kv_bytes(self) -> int:
        """Bytes of device memory held for KV."""
        return self._arena_bytes + self.window_bytes

    @property
    def window_bytes(self) -> int:
        """Bytes of them that sliding windows take."""
        return sum(
            ledger.tail.piece.memory.numel()
            for ledger in self._ledgers
            if ledger.window_tokens is not None and ledger.tail is not None
        )

    @property
    def host_kv_bytes(self) -> int:
        """Bytes of host memory held for KV."""
        return sum(ledger.host_bytes for ledger in self._ledgers)

    def tokens(self, layer_idx: int) -> int:
        """Return the tokens a layer holds."""
        self._check_open()
        return self._ledgers[layer_idx].tokens

    def expect(self, tokens: int) -> int:
        """State that layers will come to hold `tokens` tokens; memory is reserved when they do.

        Returns:
            The bytes of host memory that this adds to what is held.
        """
        self._expected_tokens = max(self._expected_tokens, tokens)
        missing = [(ledger, ledger.missing_tokens(tokens)) for ledger in self._full]
        return sum([ledger.geometry.num_bytes(more) for ledger, more in missing if more])

    def attend(
        self,
        layer_idx: int,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        *,
        kernel: Kernel,
        scale: float,
        window_tokens: int | None = None,
        padding: Padding | None = None,
        sinks: torch.Tensor | None = None,
        host_kernel: Kernel | None = None,
    ) -> torch.Tensor:
        """Attend new tokens to the past and to themselves, and keep them.

        Args:
            layer_idx: which layer, counted among those that attend.
            query: `[batch, kv_heads, group, q_len, key_dim]` on the device.
            keys: the new tokens' keys `[batch, kv_heads, q_len, key_dim]`.
            values: their values `[batch, kv_heads, q_len, value_dim]`.
            kernel: what computes partials.
            scale: factor of the scores.
            window_tokens: tokens that each query sees, its own included, of those that the layer
                keeps; None for all of them.
            padding: of all tokens, past and new, or of as many of the newest as a window sees and
                the new ones; None when there is none.
            sinks: scores `[kv_heads, group]` of attention sinks, or None.
            host_kernel: what computes partials on the CPU for a device; None when nothing may.

        Returns:
            `[batch, q_len, kv_heads, group, value_dim]` in the query's dtype, newly allocated,
            valid on the compute stream.

        Raises:
            CacheStateError: the cache was closed, or was made for other shapes.
            Exception: what the host's attention failed with, in this call or in one before.
        """
        new = KV(keys, values)
        ledger = self._check(layer_idx, new, query)
        batch, kv_heads, group, q_len, _ = query.shape
        out = query.new_empty(batch, q_len, kv_heads, group, ledger.geometry.value_dim)
        if q_len > MAX_QUERY_TOKENS or padding is not None:
            host_kernel = None
        call = Chunk(
            query=query,
            new=new,
            out=out,
            kernel=kernel,
            scale=scale,
            padding=padding,
            sinks=sinks,
        )
        if ledger.window_tokens is not None:
            self._attend_window(ledger, window_tokens, call)
            return out
        assert window_tokens is None, "all tokens of the layer are attended"
        ledger.reserve(self._expected_tokens)
        if q_len == 1 and padding is None and sinks is None and self._decode(ledger, call):
            return out
        for first in range(0, q_len, self.plan.chunk_tokens):
            part = slice(first, first + self.plan.chunk_tokens)
            chunk = call if q_len <= self.plan.chunk_tokens else call.part(part)
            self._attend_chunk(ledger, chunk, host_kernel)
        self._host.check()
        return out

    def _attend_window(self, ledger: Ledger, window_tokens: int | None, chunk: Chunk) -> None:
        """Keep new tokens of a layer with a window, and attend them to what they see."""
        tile = self._windows.take(ledger, chunk.new)
        if chunk.padding is not None:  # it ends with the new tokens, too
            start = ledger.tokens - chunk.padding.valid.shape[1]
            chunk = dataclasses.replace(chunk, padding_start=start)
        chunk.attend_window(tile, window_tokens)

    def _decode(self, ledger: Ledger, token: Chunk) -> bool:
        """Attend and keep a single token in one call of the kernel, where all others are resident.

        Returns:
            Whether they are; nothing was done if not.
        """
        past = self._keeper.extend(ledger)
        if past is None:
            return False
        try:
            with attention_mark():
                token.kernel.decode(token.query, token.new, past.kv, token.out, scale=token.scale)
        except BaseException:
            ledger.crop(ledger.tokens - 1)  # its place may never have been written
            raise
        self._keeper.commit(ledger, token.new)
        self._source.skip(ledger)
        return True

    def append(self, layer_idx: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Keep tokens that were computed elsewhere, without attending to anything.

        Args:
            layer_idx: which layer, counted among those that attend.
            keys: `[batch, kv_heads, tokens, key_dim]` on the device; may be freed afterwards.
            values: `[batch, kv_heads, tokens, value_dim]`.

        Raises:
            CacheStateError: the cache was closed, or was made for other shapes.
        """
        ledger = self._check(layer_idx, KV(keys, values))
        if ledger.window_tokens is not None:
            self._windows.take(ledger, KV(keys, values))
            return
        ledger.reserve(self._expected_tokens)
        for first in range(0, keys.shape[2], self.plan.chunk_tokens):
            new = KV(keys, values).cut(slice(first, first + self.plan.chunk_tokens))
            self._keeper.make_room(ledger, new.tokens)
            self._keeper.admit(ledger, new)
            self._keeper.commit(ledger, new)

    def _attend_chunk(self, ledger: Ledger, chunk: Chunk, host_kernel: Kernel | None) -> None:
        """Attend at most `plan.chunk_tokens` new tokens, and keep them."""
        past_tokens, kv_heads = ledger.tokens, ledger.geometry.kv_heads
        self._keeper.make_room(ledger, chunk.tokens)
        near = self._keeper.admit(ledger, chunk.new)
        self._share_with_host(ledger, 0.0 if host_kernel is None else self._balance.share)
        first, end = ledger.streamed
        if end == ledger.host_tokens:
            host_kernel = None  # nothing is left to the host
        if host_kernel is not None:
            self._host.ask(ledger, chunk.query, host_kernel, scale=chunk.scale)
        self._source.begin(ledger)
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
        self._keeper.commit(ledger, chunk.new)
        self._source.end()

    def _share_with_host(self, ledger: Ledger, share: float) -> None:
        """Set the host's share: in all layers at the first, because tiles are fetched ahead."""
        if ledger is self._full[0]:
            for each in self._full:
                each.host_share = share
        elif not share:
            ledger.host_share = 0.0

    def _check(self, layer_idx: int, new: KV, *others: torch.Tensor) -> Ledger:
        """Return a layer's ledger; refuse new tokens, and a query, that do not fit the cache."""
        self._check_open()
        ledger = self._ledgers[layer_idx]
        geometry, (keys, values) = ledger.geometry, new
        given = (keys.shape[0], keys.shape[1], keys.shape[3], values.shape[3])
        wanted = (geometry.batch, geometry.kv_heads, geometry.key_dim, geometry.value_dim)
        parts = (*new, *others)
        if given != wanted or any(part.dtype != geometry.dtype for part in parts):
            names = ", ".join(sorted({str(part.dtype) for part in parts}))
            raise CacheStateError(
                f"layer {layer_idx} was given keys and values of (batch, kv_heads, key_dim, "
                f"value_dim) {given} in {names}, but this cache holds {wanted} in "
                f"{geometry.dtype}; use a new cache"
            )
        return ledger

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
        """Remove a layer's newest `tokens` tokens, or all it has.

        Raises:
            CacheStateError: a window was closed or has dropped the tokens before those.
        """
        self._check_open()
        ledger = self._ledgers[layer_idx]
        kept = max(ledger.tokens - tokens, 0)
        if ledger.window_tokens is not None:
            self._windows.crop(ledger, kept)
            return
        if tokens > ledger.tail_tokens:
            self._settle()
            self._host.check()
        ledger.crop(kept)

    def select(self, layer_idx: int, rows: Sequence[int]) -> None:
        """Make row `i` of a layer what row `rows[i]` was, for as many rows as the plan has."""
        self._check_open()
        assert len(rows) == self.plan.batch
        if list(rows) == list(range(self.plan.batch)):
            return
        ledger = self._ledgers[layer_idx]
        if ledger.window_tokens is not None:
            self._windows.select(ledger, rows)
            return
        self._settle()
        self._host.check()
        self._keeper.select(ledger, rows)
        ledger.select_host(rows)

    def select_all(self, rows: Sequence[int], plan: Plan) -> None:
        """Make row `i` of every layer what row `rows[i]` was, under a plan for that many rows."""
        self._bring_home()
        for ledger in self._full:
            ledger.drop_device()
            ledger.select_host(rows)
        for ledger in self._ledgers:
            if ledger.window_tokens is not None:
                self._windows.select(ledger, rows)
        self._rebuild(plan)

    def replan(self, plan: Plan) -> None:
        """Go on under another plan for as many rows, with what it keeps on the device."""
        self._bring_home()
        self._rebuild(plan)

    def give_up_residents(self) -> None:
        """Keep no token on the device; costs no copy but the decode tail's."""
        self.replan(dataclasses.replace(self.plan, resident_tokens=0, resident_bytes=0))

    def _bring_home(self) -> None:
        """Have the host hold every token, at rest."""
        self._check_open()
        for ledger in self._full:
            self._keeper.flush(ledger)
        self._settle()
        self._host.check()

    def _rebuild(self, plan: Plan) -> None:
        """Take the memory of another plan; the host must hold every token, at rest."""
        self.plan = plan
        # The old arena goes before the new one comes: both together would exceed either plan.
        for ledger in self._full:
            ledger.drop_device()
        del self._source, self._keeper
        self._host.free()
        try:
            self._build()
        except BaseException:
            self._abandon()
            raise
        for ledger in self._full:
            self._keeper.fill_residents(ledger)

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
        for ledger in self._ledgers:
            ledger.clear()
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
        del self._source, self._keeper
        self._abandon()
        self._host.check()

    def _abandon(self) -> None:
        """Free what is left, with no copy in flight; the cache is closed after this."""
        self.closed = True
        self._arena_bytes = 0
        self._host.free()
        for ledger in self._ledgers:
            ledger.clear()
            ledger.drop_device()

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
