"""How new tokens reach the store: directly, or through pages on the device and the copy-out stream.

On a device with memory of its own the newest tokens of every layer stay there, as its decode tail,
until they are worth a transfer: right behind the resident tokens while there is room, so that one
call attends both, and in a page of their own after that. A prefill chunk goes through one of two
pages all layers share. Either way compute fills a page, copy-out empties it, and neither overtakes
the other.
"""

from collections.abc import Sequence
from typing import Protocol

import torch

from headinfer.device.base import Device, Edge, Event
from headinfer.engine.stats import Stats
from headinfer.engine.tiles import StoredLayer
from headinfer.store.layer import KVGeometry, Span, carver


class Writer(Protocol):
    """Takes the new keys and values of a layer into the cache."""

    def make_room(self, layer_idx: int, new_tokens: int) -> None:
        """Prepare for `new_tokens` tokens; may lengthen the store."""

    def admit(self, layer_idx: int, keys: torch.Tensor, values: torch.Tensor) -> list[Span]:
        """Begin to take new tokens, before the layer is attended.

        A single new token, which sees all others and itself, becomes part of the past at once.

        Args:
            layer_idx: which layer.
            keys: `[batch, kv_heads, new_tokens, key_dim]`.
            values: `[batch, kv_heads, new_tokens, value_dim]`.

        Returns:
            The past tokens that are on the device: resident ones, and those not in the store.
        """

    def extend(self, layer_idx: int) -> Span | None:
        """Take a single new token that compute itself is to write, instead of `admit`.

        Returns:
            All past tokens of the layer and a place behind them, on the device; None, with nothing
            taken, where they are not in one piece there.
        """

    def commit(self, layer_idx: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Finish taking them, after the layer is attended; may lengthen the store."""

    def tail_tokens(self, layer_idx: int) -> int:
        """Past tokens of a layer that are not in its store."""

    def tail(self, layer_idx: int) -> Span | None:
        """Return these tokens, for compute to read; None when there are none."""

    def crop(self, layer_idx: int, tokens: int) -> int:
        """Remove the newest `tokens` tokens that are not in the store; return how many were."""

    def select(self, layer_idx: int, rows: Sequence[int]) -> None:
        """Rearrange the rows of what is not in the store; as many rows as before."""

    def flush(self, layer_idx: int) -> None:
        """Send everything to the store."""


class DirectWriter:
    """Writes straight into the store, for a device that shares the host's memory."""

    def __init__(self, layers: Sequence[StoredLayer]) -> None:
        self._layers = layers

    def make_room(self, layer_idx: int, new_tokens: int) -> None:
        """Do nothing: the store makes room as it is written."""

    def admit(self, layer_idx: int, keys: torch.Tensor, values: torch.Tensor) -> list[Span]:
        """Write a single token at once; nothing is outside the store."""
        if keys.shape[2] == 1:
            self._write(layer_idx, keys, values)
        return []

    def extend(self, layer_idx: int) -> Span | None:
        """Return None: what is attended where it lies need not be in one piece."""

    def commit(self, layer_idx: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Write a chunk once it is attended, so that the store still ended before it."""
        if keys.shape[2] > 1:
            self._write(layer_idx, keys, values)

    def _write(self, layer_idx: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        first = 0
        for span in self._layers[layer_idx].store.extend(keys.shape[2]):
            part = slice(first, first + span.tokens)
            span.keys.copy_(keys[:, :, part])
            span.values.copy_(values[:, :, part])
            first += span.tokens

    def tail_tokens(self, layer_idx: int) -> int:
        """Return 0: all past tokens are in the store."""
        return 0

    def tail(self, layer_idx: int) -> Span | None:
        """Return None: all past tokens are in the store."""
        return None

    def crop(self, layer_idx: int, tokens: int) -> int:
        """Return 0: all past tokens are in the store."""
        return 0

    def select(self, layer_idx: int, rows: Sequence[int]) -> None:
        """Do nothing: all past tokens are in the store."""

    def flush(self, layer_idx: int) -> None:
        """Do nothing: all past tokens are in the store."""


class Page:
    """Device memory for new tokens of one layer on their way to the host."""

    def __init__(self, memory: torch.Tensor) -> None:
        self._memory = memory
        self._emptied: Event | None = None
        self._carve = carver(memory)
        self.tokens = 0

    def append(
        self,
        device: Device,
        geometry: KVGeometry,
        capacity: int,
        keys: torch.Tensor,
        values: torch.Tensor,
    ) -> None:
        """Write new tokens behind those already here, on compute."""
        if self._emptied is not None:
            device.compute.wait(self._emptied, Edge.PAGE_FREE)
            self._emptied = None
        device.compute.writes(self._memory, "new tokens into a page")
        part = slice(self.tokens, self.tokens + keys.shape[2])
        for page, new in zip(self._carve(geometry, capacity, None), (keys, values), strict=True):
            page[:, :, part].copy_(new)
        self.tokens = part.stop

    def contents(self, device: Device, geometry: KVGeometry, capacity: int, start: int) -> Span:
        """Return the tokens here, the first of which is token `start`, for compute to read."""
        device.compute.reads(self._memory, "attention to the decode tail")
        keys, values = self._carve(geometry, capacity, None)
        return Span(start, keys[:, :, : self.tokens], values[:, :, : self.tokens])

    def select(
        self, device: Device, geometry: KVGeometry, capacity: int, rows: Sequence[int]
    ) -> None:
        """Rearrange the rows, on compute."""
        device.compute.writes(self._memory, "row selection in a page")
        for page in self._carve(geometry, capacity, None):
            used = page[:, :, : self.tokens]
            used.copy_(used[list(rows)])

    def write_back(self, device: Device, layer: StoredLayer, capacity: int, stats: Stats) -> None:
        """Send the tokens to the end of the store on copy-out; the page is then empty."""
        start, pages = layer.store.tokens, self._carve(layer.store.geometry, capacity, None)
        keys, values = (page[:, :, : self.tokens] for page in pages)
        self._emptied = _send_home(device, layer, keys, values, stats)
        if layer.resident is not None:
            device.compute.reads(self._memory, "new tokens into the resident ones")
            layer.resident.append(start, keys, values)
        self.tokens = 0


def _send_home(
    device: Device, layer: StoredLayer, keys: torch.Tensor, values: torch.Tensor, stats: Stats
) -> Event:
    """Send tokens that compute wrote on the device to the end of a layer's store, on copy-out.

    Returns:
        The event on copy-out when they are there, which is the layer's `written`, too.
    """
    first, copy_out = layer.store.tokens, device.copy_out
    copy_out.wait(device.compute.record(), Edge.PAGE_WRITTEN)
    for span in layer.store.extend(keys.shape[2]):
        part = slice(span.start - first, span.start - first + span.tokens)
        copy_out.copy(span.keys, keys[:, :, part])
        copy_out.copy(span.values, values[:, :, part])
    stats.bytes_to_host += layer.store.geometry.num_bytes(keys.shape[2])
    layer.written = copy_out.record()
    return layer.written


class PagedWriter:
    """Writes into pages on the device, which copy-out brings to the store.

    Args:
        device: where the pages are.
        layers: the stores.
        tails: for each layer, pages of `page_tokens` tokens.
        chunk_pages: pages of `chunk_tokens` tokens, shared by all layers.
        page_tokens: the most tokens that go through the tail; more go through a chunk page.
        chunk_tokens: the most tokens that are taken at once.
        stats: where bytes are counted.
    """

    def __init__(
        self,
        device: Device,
        layers: Sequence[StoredLayer],
        *,
        tails: Sequence[Sequence[Page]],
        chunk_pages: Sequence[Page],
        page_tokens: int,
        chunk_tokens: int,
        stats: Stats,
    ) -> None:
        self._device = device
        self._layers = layers
        self._tails = [list(pages) for pages in tails]
        self._chunk_pages = list(chunk_pages)
        self._page_tokens = page_tokens
        self._chunk_tokens = chunk_tokens
        self._stats = stats
        self._unsent = [0] * len(layers)  # the newest of the resident tokens, not yet in the store

    def make_room(self, layer_idx: int, new_tokens: int) -> None:
        """Send the tail home where the new tokens would make it longer than a page."""
        if self.tail_tokens(layer_idx) + new_tokens > self._page_tokens:
            self.flush(layer_idx)

    def admit(self, layer_idx: int, keys: torch.Tensor, values: torch.Tensor) -> list[Span]:
        """Return the resident tokens and the tail, a single new token already in it."""
        if keys.shape[2] == 1:
            self._append(layer_idx, keys, values)
        layer, page = self._layers[layer_idx], self._tails[layer_idx][0]
        near = [] if layer.resident is None else layer.resident.span()
        if page.tokens:
            geometry, start = layer.store.geometry, layer.store.tokens
            near.append(page.contents(self._device, geometry, self._page_tokens, start))
        return near

    def extend(self, layer_idx: int) -> Span | None:
        """Return the resident tokens and a place behind them where they are all there is."""
        layer, page = self._layers[layer_idx], self._tails[layer_idx][0]
        resident = layer.resident
        if resident is None or page.tokens:
            return None
        tokens = layer.store.tokens + self._unsent[layer_idx]
        if not resident.has_room(tokens, 1):
            return None
        self.make_room(layer_idx, 1)
        self._unsent[layer_idx] += 1
        return resident.extend()

    def commit(self, layer_idx: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Put a few tokens into the tail, send more to the host, and empty a full page."""
        new_tokens = keys.shape[2]
        if 1 < new_tokens <= self._page_tokens:
            self._append(layer_idx, keys, values)
        elif new_tokens > 1:
            layer = self._layers[layer_idx]
            page = self._chunk_pages.pop(0)
            self._chunk_pages.append(page)
            page.append(self._device, layer.store.geometry, self._chunk_tokens, keys, values)
            page.write_back(self._device, layer, self._chunk_tokens, self._stats)
        if self.tail_tokens(layer_idx) == self._page_tokens:
            self.flush(layer_idx)

    def _append(self, layer_idx: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Put tokens into the tail."""
        layer, page = self._layers[layer_idx], self._tails[layer_idx][0]
        start, resident = layer.store.tokens + self._unsent[layer_idx], layer.resident
        if not page.tokens and resident is not None and resident.has_room(start, keys.shape[2]):
            resident.append(start, keys, values)
            self._unsent[layer_idx] += keys.shape[2]
            return
        self._send_resident(layer_idx)
        page.append(self._device, layer.store.geometry, self._page_tokens, keys, values)

    def _send_resident(self, layer_idx: int) -> None:
        """Send the resident tokens that the store lacks to its end, on copy-out."""
        layer, tokens = self._layers[layer_idx], self._unsent[layer_idx]
        if tokens and layer.resident is not None:
            _send_home(self._device, layer, *layer.resident.newest(tokens), self._stats)
            self._unsent[layer_idx] = 0

    def tail_tokens(self, layer_idx: int) -> int:
        """Return the tokens that are only on the device."""
        return self._unsent[layer_idx] or self._tails[layer_idx][0].tokens

    def tail(self, layer_idx: int) -> Span | None:
        """Return the newest resident tokens, or what is in the layer's page."""
        layer, page = self._layers[layer_idx], self._tails[layer_idx][0]
        start, unsent = layer.store.tokens, self._unsent[layer_idx]
        if unsent and layer.resident is not None:
            return Span(start, *layer.resident.newest(unsent))
        if not page.tokens:
            return None
        return page.contents(self._device, layer.store.geometry, self._page_tokens, start)

    def crop(self, layer_idx: int, tokens: int) -> int:
        """Shorten the tail."""
        removed = min(tokens, self.tail_tokens(layer_idx))
        resident = self._layers[layer_idx].resident
        if self._unsent[layer_idx] and resident is not None:
            self._unsent[layer_idx] -= removed
            resident.crop(resident.tokens - removed)
        else:
            self._tails[layer_idx][0].tokens -= removed
        return removed

    def select(self, layer_idx: int, rows: Sequence[int]) -> None:
        """Rearrange the page being written; the resident tokens are rearranged as a whole."""
        page = self._tails[layer_idx][0]
        if page.tokens:
            geometry = self._layers[layer_idx].store.geometry
            page.select(self._device, geometry, self._page_tokens, rows)

    def flush(self, layer_idx: int) -> None:
        """Send the tail to the host, and go on in the other page."""
        self._send_resident(layer_idx)
        pages = self._tails[layer_idx]
        if pages[0].tokens:
            pages[0].write_back(
                self._device, self._layers[layer_idx], self._page_tokens, self._stats
            )
            pages.append(pages.pop(0))
