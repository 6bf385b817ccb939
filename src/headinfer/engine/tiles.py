"""Where attention gets its tiles from: views of host memory, or buffers filled over the link.

A source is asked layer by layer, `begin`, `tiles` for each group of heads in order, `end`. The
tiles of a whole forward pass, and of the next one, are known beforehand, so `PrefetchedTiles` runs
ahead across layers; `SynchronousTiles` is its plain twin (the paper's section 3.3 without and with
asynchronous transfer).
"""

import collections
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from headinfer.device.base import Device, Edge, Event
from headinfer.engine.stats import Stats
from headinfer.kv.extent import Piece, Tile
from headinfer.kv.ledger import Ledger


def head_groups(kv_heads: int, tile_heads: int) -> list[slice]:
    """Return the KV heads in groups of `tile_heads`, the last one possibly smaller."""
    return [
        slice(first, min(first + tile_heads, kv_heads)) for first in range(0, kv_heads, tile_heads)
    ]


def streamed_tiles(ledger: Ledger, heads: slice, tile_tokens: int) -> Iterator[Tile]:
    """Yield the host's tiles that come over the link, for some heads."""
    first, end = ledger.streamed
    return ledger.host_tiles(first, end, max_tokens=tile_tokens, heads=heads)


class TileSource(Protocol):
    """Yields the stored tokens of one layer after another, tile by tile, on the device."""

    def begin(self, ledger: Ledger) -> None:
        """Turn to a layer; its stored tokens stay as they are until `end`."""

    def tiles(self, heads: slice) -> Iterator[Tile]:
        """Yield the tiles of one group of heads, each valid until the next is asked for.

        Groups must be asked for in order, and each must be exhausted.
        """

    def end(self) -> None:
        """Finish the layer; its stored tokens may change after this."""

    def skip(self, ledger: Ledger) -> None:
        """Pass by a layer that needs no tile: `begin` and `end` at once."""

    def drop(self) -> None:
        """Forget what was fetched ahead; called when stored tokens change between passes."""


class ViewTiles:
    """Tiles where they lie, for a device that attends host memory directly."""

    def __init__(self, tile_tokens: int) -> None:
        self._tile_tokens = tile_tokens
        self._layer: Ledger | None = None

    def begin(self, ledger: Ledger) -> None:
        """Turn to a layer."""
        self._layer = ledger

    def tiles(self, heads: slice) -> Iterator[Tile]:
        """Yield views of the store."""
        assert self._layer is not None
        return streamed_tiles(self._layer, heads, self._tile_tokens)

    def end(self) -> None:
        """Finish the layer."""
        self._layer = None

    def skip(self, ledger: Ledger) -> None:
        """Do nothing."""

    def drop(self) -> None:
        """Do nothing: nothing is fetched ahead."""


def fetch(
    device: Device, ledger: Ledger, tile: Tile, buffer: Piece, stats: Stats
) -> tuple[Tile, Event]:
    """Enqueue the copy of a host tile into a staging buffer, on copy-in.

    Returns:
        The tile on the device, and the event on copy-in when it is there.
    """
    if buffer.free is not None:
        device.copy_in.wait(buffer.free, Edge.TILE_FREE)
    if tile.piece.ready is not None:
        device.copy_in.wait(tile.piece.ready, Edge.HOST_WRITTEN)
    source = tile.kv
    heads = source.keys.shape[1]
    place = buffer.views(ledger.geometry, tile.tokens, heads)
    device.copy_in.copy(place.keys, source.keys)
    device.copy_in.copy(place.values, source.values)
    stats.bytes_to_device += ledger.geometry.num_bytes(tile.tokens, heads=heads)
    return Tile(tile.start, tile.tokens, buffer, place), device.copy_in.record()


def hand_over(device: Device, buffer: Piece, filled: Event) -> None:
    """Let compute read a staging buffer."""
    device.compute.wait(filled, Edge.TILE_FILLED)
    device.compute.reads(buffer.memory, "attention to a tile")


class SynchronousTiles:
    """Fetch, wait, attend, one tile at a time: the oracle of the prefetching twin."""

    def __init__(
        self,
        device: Device,
        buffer: Piece,
        tile_tokens: int,
        stats: Stats,
    ) -> None:
        self._device = device
        self._buffer = buffer
        self._tile_tokens = tile_tokens
        self._stats = stats
        self._layer: Ledger | None = None

    def begin(self, ledger: Ledger) -> None:
        """Turn to a layer."""
        self._layer = ledger

    def tiles(self, heads: slice) -> Iterator[Tile]:
        """Yield tiles, waiting on the host for each to arrive and to be attended."""
        layer = self._layer
        assert layer is not None
        for stored in streamed_tiles(layer, heads, self._tile_tokens):
            tile, filled = fetch(self._device, layer, stored, self._buffer, self._stats)
            filled.synchronize(Edge.TILE_FILLED)
            hand_over(self._device, self._buffer, filled)
            yield tile
            self._buffer.free = self._device.compute.record()
            self._device.synchronize()

    def end(self) -> None:
        """Finish the layer."""
        self._layer = None

    def skip(self, ledger: Ledger) -> None:
        """Do nothing."""

    def drop(self) -> None:
        """Do nothing: nothing is fetched ahead."""


@dataclass(slots=True)
class _Fetched:
    turn: int
    first_head: int
    tile: Tile
    buffer: Piece
    filled: Event


def _state(layer: Ledger) -> tuple[int, ...]:
    """Return what the tiles of a layer's turn depend on."""
    return layer.version, *layer.streamed


class PrefetchedTiles:
    """Keeps every free buffer filling with the next tiles, across layers and passes.

    A *turn* is one layer's attention; turns go round the layers. Tiles of a turn may be fetched
    once the same layer's previous turn has ended, since only then its stored tokens are final: so
    at most a whole round lies between what is attended and what is fetched.

    Invariant: the fetched tiles, in order, are the next tiles to be asked for, unless the layers
    were asked out of order, a store changed since (its version tells), or other tokens are to be
    streamed than before; then all are dropped.
    """

    def __init__(
        self,
        device: Device,
        layers: Sequence[Ledger],
        buffers: Sequence[Piece],
        *,
        tile_heads: int,
        tile_tokens: int,
        stats: Stats,
    ) -> None:
        self._device = device
        self._layers = layers
        self._buffers = tuple(buffers)
        self._tile_heads = tile_heads
        self._tile_tokens = tile_tokens
        self._stats = stats
        self._fetched: collections.deque[_Fetched] = collections.deque()
        self._in_hand: _Fetched | None = None  # what the caller attends now
        self._restart(0)

    def _restart(self, layer_idx: int) -> None:
        """Begin a new order at `layer_idx`; fills in flight stay in copy-in's order."""
        self._take_back()
        self._fetched.clear()
        self._free = collections.deque(self._buffers)  # also one that Ctrl-C left half fetched
        self._first_layer = layer_idx
        self._begun = False  # whether the turn began and did not end: it failed
        self._turn = 0  # the turn being attended, or next to be
        self._states: dict[int, tuple[int, ...]] = {}  # of the turns being fetched
        # What is left to fetch of the newest such turn, each with its first head.
        self._rest: Iterator[tuple[int, Tile]] = iter(())
        self._started = 0  # turns whose fetching has started

    def _layer_of(self, turn: int) -> Ledger:
        return self._layers[(self._first_layer + turn) % len(self._layers)]

    def _host_tiles(self, layer: Ledger) -> Iterator[tuple[int, Tile]]:
        for heads in head_groups(layer.geometry.kv_heads, self._tile_heads):
            for tile in streamed_tiles(layer, heads, self._tile_tokens):
                yield heads.start, tile

    def _fetch_ahead(self) -> None:
        """Fill free buffers with the tiles that come next, as far as they are known."""
        while self._free:
            first_head, stored = next(self._rest, (0, None))
            if stored is not None:
                turn = self._started - 1
                buffer = self._free.popleft()
                layer = self._layer_of(turn)
                tile, filled = fetch(self._device, layer, stored, buffer, self._stats)
                self._fetched.append(_Fetched(turn, first_head, tile, buffer, filled))
            elif self._started < self._turn + len(self._layers):
                layer = self._layer_of(self._started)
                self._states[self._started] = _state(layer)
                self._rest = self._host_tiles(layer)
                self._started += 1
            else:
                return

    def begin(self, ledger: Ledger) -> None:
        """Turn to a layer, and start over where it was not the one expected or has changed."""
        expected = self._layer_of(self._turn) is ledger and not self._begun
        if not expected or self._states.get(self._turn, _state(ledger)) != _state(ledger):
            self._restart(self._layers.index(ledger))
        self._begun = True
        self._fetch_ahead()

    def tiles(self, heads: slice) -> Iterator[Tile]:
        """Yield tiles as they arrive on the device, while the next ones are on their way."""
        tokens = 0
        # With no tile in the caller's hands, what is not fetched by now does not exist.
        while self._is_next(heads):
            fetched = self._in_hand = self._fetched.popleft()
            hand_over(self._device, fetched.buffer, fetched.filled)
            tokens += fetched.tile.tokens
            yield fetched.tile
            self._take_back()
            self._fetch_ahead()
        first, end = self._layer_of(self._turn).streamed
        assert tokens == end - first, f"{tokens} tokens were fetched of those from {first} to {end}"

    def _take_back(self) -> None:
        """Free the buffer in the caller's hands; also where its attention failed."""
        if self._in_hand is not None:
            self._in_hand.buffer.free = self._device.compute.record()
            self._free.append(self._in_hand.buffer)
            self._in_hand = None

    def _is_next(self, heads: slice) -> bool:
        """Whether the next tile is of this turn and of some heads."""
        if not self._fetched:
            return False
        fetched = self._fetched[0]
        return fetched.turn == self._turn and fetched.first_head == heads.start

    def end(self) -> None:
        """Finish the turn; fetching may go one turn further."""
        self._states.pop(self._turn, None)
        self._begun = False
        self._turn += 1
        self._fetch_ahead()

    def skip(self, ledger: Ledger) -> None:
        """Pass by a layer; at little cost where nothing is fetched, as when all is resident."""
        expected = self._layer_of(self._turn) is ledger and not self._begun
        if self._fetched or not expected:
            self.begin(ledger)
            self.end()
            return
        self._turn += 1
        self._started = self._turn
        self._rest = iter(())
        self._states.clear()

    def drop(self) -> None:
        """Forget what was fetched ahead."""
        self._restart(0)
