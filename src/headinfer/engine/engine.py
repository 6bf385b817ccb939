"""One cache's engine: attention of one layer over its past tiles and its new tokens.

The life of a layer's call: room is made for the new tokens; then, for each group of heads, the
chunk is attended to itself, to what is on the device, and to each of the host's tiles as it
arrives; in a decode step the host attends its share meanwhile; the partials merge by LSE; at last
the new tokens go to the host. A single token where all before it are resident takes one call of the
kernel, and so does a layer with a window.
"""

import dataclasses

import torch

from headinfer.attend.masks import Padding
from headinfer.attend.partial import Partial
from headinfer.attend.table import Kernels
from headinfer.attend.work import Work
from headinfer.engine.chunk import Chunk, attention_mark
from headinfer.engine.held import HeldTokens
from headinfer.engine.host_attention import MAX_QUERY_TOKENS
from headinfer.engine.tiles import head_groups
from headinfer.kv.ledger import Ledger
from headinfer.kv.pair import KV


class Engine(HeldTokens):
    """The attention layers of one cache: their ledgers, the device arena, and their attention.

    Not safe for use by several threads at once, like the transformers cache it serves.
    """

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

        Args:
            layer_idx: which layer, counted among those that attend.
            query: `[batch, kv_heads, group, q_len, key_dim]` on the device.
            keys: the new tokens' keys `[batch, kv_heads, q_len, key_dim]`.
            values: their values `[batch, kv_heads, q_len, value_dim]`.
            kernels: what computes partials.
            scale: factor of the scores.
            window_tokens: tokens that each query sees, its own included, of those that the layer
                keeps; None for all of them.
            padding: of all tokens, past and new, or of as many of the newest as a window sees and
                the new ones; None when there is none.
            sinks: scores `[kv_heads, group]` of attention sinks, or None.
            host_kernels: what computes partials on the CPU for a device; None when nothing may.

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
            host_kernels = None
        call = Chunk(
            query=query,
            new=new,
            out=out,
            kernels=kernels,
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
            self._attend_chunk(ledger, chunk, host_kernels)
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
                work = Work(token.query, (past,), token.scale, new=token.new, out=token.out)
                token.kernels.decode(work)
        except BaseException:
            ledger.crop(ledger.tokens - 1)  # its place may never have been written
            raise
        self._keeper.commit(ledger, token.new)
        self._source.skip(ledger)
        return True

    def _attend_chunk(self, ledger: Ledger, chunk: Chunk, host_kernels: Kernels | None) -> None:
        """Attend at most `plan.chunk_tokens` new tokens, and keep them."""
        past_tokens, kv_heads = ledger.tokens, ledger.geometry.kv_heads
        self._keeper.make_room(ledger, chunk.tokens)
        near = self._keeper.admit(ledger, chunk.new)
        self._share_with_host(ledger, 0.0 if host_kernels is None else self._balance.share)
        first, end = ledger.streamed
        if end == ledger.host_tokens:
            host_kernels = None  # nothing is left to the host
        if host_kernels is not None:
            self._host.ask(ledger, chunk.query, host_kernels, scale=chunk.scale)
        self._source.begin(ledger)
        # What is not streamed is on the device for all heads, and few tokens need no groups.
        in_groups = first < end or chunk.tokens > self.plan.page_tokens
        waiting = []
        for heads in head_groups(kv_heads, self.plan.tile_heads if in_groups else kv_heads):
            total = chunk.attend(heads, near, self._source.tiles(heads), past_tokens)
            if host_kernels is not None:
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
