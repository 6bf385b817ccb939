"""Attention where the bytes lie: the CPU attends some of a layer's tokens in host memory.

Of those tokens only the query crosses the link, and only the partial result comes back, to be
merged like any tile's. Meanwhile the link brings other tokens, and the device attends those and its
resident ones: all of that is enqueued before the CPU begins, so the three work at the same time
without a thread of ours.
"""

import time

import torch
from torch.profiler import record_function

from headinfer.attend.partial import Accumulator, Kernel, Partial
from headinfer.device.base import Device, Edge, Event
from headinfer.engine.stats import Stats
from headinfer.engine.tiles import StoredLayer

MAX_QUERY_TOKENS = 8
"""New tokens up to which the CPU can help: more make it compute instead of read."""


HOST_ATTENTION_MARK = "headinfer: host attention"
"""What a profiler shows around the CPU's share of a layer's attention."""

_NOTES = 256
"""Layers' attentions after which the host's share is judged: changing it discards what was fetched
ahead, which must stay rare."""

_LATE, _EARLY = 0.75, 0.25
_FIRST_STEP, _LAST_STEP = 0.2, 0.01
"""If the host was later than the device in more than the first share of them, its share shrinks by
a step; if in less than the second, it grows by one. Steps get shorter each time they turn."""


class Balance:
    """The host's share of the tokens that are not resident, corrected by who finishes first.

    Args:
        share: to begin with.
        fixed: whether it stays.

    Attributes:
        share: as it is now.
    """

    def __init__(self, share: float, *, fixed: bool) -> None:
        self.share = share
        self._fixed = fixed
        self._notes = self._late = 0
        self._step = _FIRST_STEP
        self._grew: bool | None = None

    def note(self, *, host_was_late: bool) -> None:
        """Take in whether the device had finished its part of a layer before the host did."""
        self._notes += 1
        self._late += host_was_late
        if self._fixed or self._notes < _NOTES:
            return
        late = self._late / self._notes
        self._notes = self._late = 0
        if _EARLY <= late <= _LATE:
            return
        grows = late < _EARLY
        if self._grew is not None and grows != self._grew:
            self._step = max(self._step / 2, _LAST_STEP)
        self._grew = grows
        self.share = (
            min(self.share / (1 - self._step), 1.0) if grows else (self.share * (1 - self._step))
        )


class HostAttention:
    """Attends the newest stored tokens of one layer after another on the CPU.

    Its host buffers are reused from layer to layer. Waiting for a query frees them: on compute it
    comes after the result of the query before was fetched.

    Args:
        device: what asks.
        stats: where bytes and seconds are counted.
        balance: told who finishes first.
    """

    def __init__(self, device: Device, stats: Stats, balance: Balance) -> None:
        self._device = device
        self._stats = stats
        self._balance = balance
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

        Blocks the host until the CPU is done. What the device shall do meanwhile must be enqueued.

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
        meanwhile = self._device.compute.record()
        with record_function(HOST_ATTENTION_MARK):
            partial = self._attend(layer, query, kernel, scale)
        self._balance.note(host_was_late=meanwhile.reached)
        parts = [
            self._send_back(name, part)
            for name, part in (("out", partial.out), ("lse", partial.lse))
        ]
        self._taken = self._device.compute.record()
        return Partial(*parts)

    def settle(self) -> None:
        """Wait until compute is done with the host buffers, so that they may be freed."""
        for event in (self._asked, self._taken):
            if event is not None:
                event.synchronize(Edge.HOST_SETTLED)

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
