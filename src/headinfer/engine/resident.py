"""The oldest tokens of a layer, kept on the device as well, so that they never cross the link.

The paper moves the whole KV cache for every token (section 3.3); what fits beside weights and
staging buffers need not move. The oldest tokens are chosen because they are final: new tokens go
behind them, and the same number in every layer keeps link and device busy at the same time. The
host holds them too, but for the newest few (a page of the decode tail), so that giving them up
costs hardly a copy.
"""

from collections.abc import Sequence

import torch

from headinfer.device.base import Device, Edge, Event
from headinfer.store.layer import KVGeometry, LayerStore, Span


class Resident:
    """Device memory for the first tokens of one layer.

    Written by compute as tokens arrive, and by copy-in where they are only on the host; read by
    compute, and by copy-out for those the host does not have yet.

    Args:
        device: where the memory is.
        memory: at least `geometry.num_bytes(capacity)` bytes.
        geometry: of the layer.
        capacity: the most tokens kept.

    Attributes:
        tokens: tokens now kept: those from 0 to before it.
    """

    def __init__(
        self, device: Device, memory: torch.Tensor, geometry: KVGeometry, capacity: int
    ) -> None:
        self.tokens = 0
        self._device = device
        self._memory = memory
        self._capacity = capacity
        self._keys, self._values = geometry.carve(memory, capacity)
        self._filled: Event | None = None

    def has_room(self, start: int, new_tokens: int) -> bool:
        """Whether all of some new tokens, the first at `start`, can be kept."""
        return start == self.tokens and start + new_tokens <= self._capacity

    def append(self, start: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Keep those of some new tokens that follow what is kept and fit, on compute.

        Args:
            start: position of the first new token.
            keys: `[batch, kv_heads, new_tokens, key_dim]`, written by compute.
            values: `[batch, kv_heads, new_tokens, value_dim]`, likewise.
        """
        new_tokens = min(keys.shape[2], self._capacity - start)
        if start != self.tokens or new_tokens <= 0:
            return
        self._wait_filled()
        part = slice(start, start + new_tokens)
        if new_tokens < keys.shape[2]:
            keys, values = keys[:, :, :new_tokens], values[:, :, :new_tokens]
        for kept, new in ((self._keys, keys), (self._values, values)):
            place = kept[:, :, part]
            self._device.compute.writes(place, "new tokens into the resident ones")
            place.copy_(new)
        self.tokens = part.stop

    def extend(self) -> Span:
        """Return what is kept and a place behind it, where compute is to write one more token.

        There must be room. All of it may be read as soon as that is written.
        """
        self._wait_filled()
        part = slice(0, self.tokens + 1)
        span = Span(0, self._keys[:, :, part], self._values[:, :, part])
        if self._device.checks_accesses:
            for place in (span.keys, span.values):
                self._device.compute.writes(place[:, :, -1:], "a new token into the resident ones")
            self._device.compute.reads(self._memory, "attention to resident tokens")
        self.tokens = part.stop
        return span

    def newest(self, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return keys and values of the newest `tokens`, for copy-out to read.

        Nothing is written over them before they arrived: a crop that reaches stored tokens waits.
        """
        part = slice(self.tokens - tokens, self.tokens)
        return self._keys[:, :, part], self._values[:, :, part]

    def span(self) -> list[Span]:
        """Return what is kept, for compute to read; empty when that is nothing."""
        if not self.tokens:
            return []
        self._wait_filled()
        self._device.compute.reads(self._memory, "attention to resident tokens")
        part = slice(0, self.tokens)
        return [Span(0, self._keys[:, :, part], self._values[:, :, part])]

    def crop(self, tokens: int) -> None:
        """Keep no token from `tokens` on."""
        self.tokens = min(self.tokens, tokens)

    def select(self, rows: Sequence[int]) -> None:
        """Make row `i` what row `rows[i]` was, on compute; one head at a time to save memory."""
        if not self.tokens:
            return
        self._wait_filled()
        self._device.compute.writes(self._memory, "row selection in resident tokens")
        for part in (self._keys, self._values):
            for head in range(part.shape[1]):
                used = part[:, head, : self.tokens]
                used.copy_(used[list(rows)])

    def fill(self, store: LayerStore) -> None:
        """Fetch all tokens from the host that fit, on copy-in; none may be kept yet.

        The store must be at rest.
        """
        assert not self.tokens, "what is kept must not be fetched again"
        copy_in, tokens = self._device.copy_in, 0
        for span in store.spans(0, min(store.tokens, self._capacity)):
            part = slice(span.start, span.start + span.tokens)
            copy_in.copy(self._keys[:, :, part], span.keys)
            copy_in.copy(self._values[:, :, part], span.values)
            tokens = part.stop
        self._filled = copy_in.record()
        self.tokens = tokens  # not before there is something to wait for, should Ctrl-C come

    def _wait_filled(self) -> None:
        if self._filled is not None:
            self._device.compute.wait(self._filled, Edge.TILE_FILLED)
            self._filled = None
