"""One cache's engine: attention of one layer over its past tiles and its new tokens.

The life of a layer's call: room is made for the new tokens; then, for each group of heads, the
chunk is attended to itself, to what is on the device, and to each stored tile as it arrives; in a
decode step the host attends its share meanwhile; the partials merge by LSE; at last the new tokens
go to the store. A single token where all before it are resident takes one call of the kernel.
"""

import torch

from headinfer.attend.masks import Padding
from headinfer.attend.partial import Kernel, Partial
from headinfer.engine.chunk import Chunk, attention_mark
from headinfer.engine.held import HeldTokens
from headinfer.engine.host_attention import MAX_QUERY_TOKENS
from headinfer.engine.tiles import head_groups


class Engine(HeldTokens):
    """The offloaded layers of one cache: their stores, the device arena, and their attention.

    Not safe for use by several threads at once, like the transformers cache it serves.
    """

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
