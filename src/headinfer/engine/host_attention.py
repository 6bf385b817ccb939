"""Attention where the bytes lie: the CPU attends some of a layer's tokens in host memory.

Of those tokens only the query crosses the link, and only the partial result comes back, to be
merged like any tile's. Meanwhile the link brings other tokens, and the device attends those and its
resident ones: all of that is enqueued before the CPU begins, so the three work at the same time
without a thread of ours.
"""

import time

import torch

from headinfer.attend.partial import Accumulator, Kernel, Partial
from headinfer.device.base import Device, Edge, Event
from headinfer.engine.stats import Stats
from headinfer.engine.tiles import StoredLayer

MAX_QUERY_TOKENS = 8
"""New tokens up to which the CPU can help: more make it compute instead of read."""


class HostAttention:
    """Attends the newest stored tokens of one layer after another on the CPU.

    Its host buffers are reused from layer to layer. Waiting for a query frees them: on compute it
    comes after the result of the query before was fetched.

    Args:
        device: what asks.
        stats: where bytes and seconds are counted.
    """

    def __init__(self, device: Device, stats: Stats) -> None:
        self._device = device
        self._stats = stats
        self._buffers: dict[str, torch.Tensor] = {}
        self._asked: Event | None = None
        self._taken: Event | None = None

    def ask(self, query: torch.Tensor) -> None:
        """Enqueue the query's way to the host, on compute; before what shall run meanwhile.

        Args:
            query: `[batch, kv_heads, group, q_len, key_dim]` on the device.
        """
        query = query.contiguous()
        self._device.compute.copy(self._buffer("query", query.shape, query.dtype), query)
        self._asked = self._device.compute.record()

    def answer(self, layer: StoredLayer, kernel: Kernel, *, scale: float) -> Partial:
        """Attend what is left to the host, and enqueue the result's way back, on compute.

        Blocks the host until the CPU is done.

        Args:
            layer: whose tokens from the end of its `streamed` on are attended.
            kernel: of the CPU.
            scale: factor of the scores.

        Returns:
            The partial result on the device, valid on compute.
        """
        assert self._asked is not None, "the query was not sent"
        self._asked.synchronize(Edge.QUERY_SENT)
        if layer.written is not None:
            layer.written.synchronize(Edge.TOKENS_SENT)
        query = self._buffers["query"]
        self._device.host_access(query, write=False, purpose="attention on the host")
        partial = self._attend(layer, query, kernel, scale)
        parts = [
            self._send_back(name, part)
            for name, part in (("out", partial.out), ("lse", partial.lse))
        ]
        self._taken = self._device.compute.record()
        return Partial(*parts)

    def settle(self) -> None:
        """Wait until compute has fetched the last result, so that its buffer may be freed."""
        if self._taken is not None:
            self._taken.synchronize(Edge.HOST_SETTLED)

    def _attend(
        self, layer: StoredLayer, query: torch.Tensor, kernel: Kernel, scale: float
    ) -> Partial:
        """Attend the host's tokens on the CPU."""
        start_s = time.perf_counter()
        store, total = layer.store, Accumulator()
        _, first = layer.streamed
        for span in store.spans(first, store.tokens):
            for part in (span.keys, span.values):
                for row in part:
                    for head in row:
                        self._device.host_access(head, write=False, purpose="host attention")
            total.add(kernel.attend(query, span.keys, span.values, scale=scale))
        self._stats.host_attention_s += time.perf_counter() - start_s
        self._stats.bytes_attended_on_host += store.geometry.num_bytes(store.tokens - first)
        return total.result()

    def _send_back(self, name: str, part: torch.Tensor) -> torch.Tensor:
        """Enqueue the copy of a part of the result to the device, through its host buffer."""
        buffer = self._buffer(name, part.shape, part.dtype)
        self._device.host_access(buffer, write=True, purpose="result of the host's attention")
        buffer.copy_(part)
        result = torch.empty(part.shape, dtype=part.dtype, device=self._device.torch_device)
        self._device.compute.copy(result, buffer)
        return result

    def _buffer(self, name: str, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
        """Return the host buffer of a name, made anew where shape or dtype differ."""
        buffer = self._buffers.get(name)
        if buffer is None or buffer.shape != shape or buffer.dtype != dtype:
            memory = self._device.host_empty(shape.numel() * dtype.itemsize)
            # A view that changes the dtype in inference mode could not be written to outside it.
            with torch.inference_mode(False):
                buffer = self._buffers[name] = memory.view(dtype).view(shape)
        return buffer
