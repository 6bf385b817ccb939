"""How streamed tiles come to where they are attended: ahead of it, in turn with it, or not at all.

The three ways are twins behind `TileSource`. The tiles of a whole pass, and of the next one, are
known beforehand, so `OverlappedTiles` runs ahead across layers (the paper's section 3.3).
`SequentialTiles` (in `fetch_in_turn`) fetches, waits and attends one tile at a time. It is the
oracle of the former, and the ablation. `InPlaceTiles` is for a device that attends host memory.
"""

import collections
from collections.abc import Iterator, Sequence
from typing import Protocol

from headinfer.device.base import Device, Edge
from headinfer.engine.disk_tiles import DiskTiles, Next, ReadAhead
from headinfer.engine.packing import Packing
from headinfer.engine.staging import Fetched, fetch
from headinfer.engine.stats import Stats
from headinfer.kv.extent import Piece, Tile
from headinfer.kv.ledger import Ledger
from headinfer.kv.pair import ALL_HEADS
from headinfer.schedule.route import Sizes
from headinfer.schedule.route import fetched as fetched_by
from headinfer.schedule.steps import Fetch


def head_groups(kv_heads: int, tile_heads: int) -> list[slice]:
    """Return the KV heads in groups of `tile_heads`, the last one possibly smaller."""
    if tile_heads >= kv_heads:
        return [ALL_HEADS]
    return [
        slice(first, min(first + tile_heads, kv_heads)) for first in range(0, kv_heads, tile_heads)
    ]


class TileSource(Protocol):
    """A source of one layer's tiles after another's, where compute reads them.

    A layer that fetches nothing is passed by without a word.

    Attributes:
        host_share: share of the tokens beside the residents that the host attends: passes to come
            are expected to leave so much out.
        begun: whether `begin` was called for a layer, and `end` was not.
        lends: whether `lend` gives buffers.
        lent: whether it gave them and `begin` did not come since.
        packing: unpacks tiles that are packed; None where none is.
    """

    host_share: float
    begun: bool
    lends: bool
    lent: bool
    packing: Packing | None

    def begin(self, ledger: Ledger, step: Fetch) -> None:
        """Turn to a layer; its stored tokens stay as they are until `end`."""

    def tiles(self, ledger: Ledger, heads: slice) -> Iterator[Tile]:
        """Yield the tiles of one group of heads, each valid on compute until the next is asked for.

        Groups must be asked for in order, and each must be exhausted.
        """

    def end(self) -> None:
        """Finish the layer; its stored tokens may change after this."""

    def drop(self) -> None:
        """Forget what was fetched ahead; called when stored tokens change between passes."""

    def lend(self) -> tuple[Piece, ...]:
        """Return the staging buffers, for compute to give to others until the next `begin`.

        What was fetched ahead is forgotten. There are none where nothing is to be fetched ahead.
        """


class InPlaceTiles:
    """A source of tiles where they lie, for a device that attends host memory.

    Args:
        tile_tokens: the most tokens of a tile.
    """

    lends = lent = False
    packing: Packing | None = None

    def __init__(self, tile_tokens: int) -> None:
        self.host_share = 0.0
        self.begun = False
        self._tile_tokens = tile_tokens

    def begin(self, ledger: Ledger, step: Fetch) -> None:
        """Never called: nothing is fetched."""

    def tiles(self, ledger: Ledger, heads: slice) -> Iterator[Tile]:
        """Yield views of host memory."""
        tokens = self._tile_tokens
        return ledger.host_tiles(0, ledger.host_tokens, max_tokens=tokens, groups=(heads,))

    def end(self) -> None:
        """Never called."""

    def drop(self) -> None:
        """Do nothing: nothing is fetched ahead."""

    def lend(self) -> tuple[Piece, ...]:
        """Return nothing: there are no buffers."""
        return ()


class OverlappedTiles:
    """A source that keeps free buffers filling with the next tiles, across layers and passes.

    A *turn* is one layer's streaming; turns go round the layers. Tiles of a turn may be fetched
    once the same layer's previous turn has ended: only then its stored tokens are final. So at most
    a whole round lies between what is attended and what is fetched. A pass that streams nothing
    takes no turns: the next pass's tiles stay on their way.

    Invariant: the fetched tiles, in order, are the next tiles to be asked for. All are dropped
    where layers are asked out of order, or other tokens are streamed than were expected. The
    ledger's version tells that the host's tokens changed since.

    Args:
        device: where tiles are fetched to.
        ledgers: of the layers that may stream, in the order of a pass.
        buffers: memory for a tile each.
        sizes: of tiles.
        stats: where bytes are counted.
        packing: unpacks tiles that are packed; None where none is.
        disk: reads tiles that are on the disk; None where none is.
    """

    lends = True

    def __init__(
        self,
        device: Device,
        ledgers: Sequence[Ledger],
        buffers: Sequence[Piece],
        sizes: Sizes,
        stats: Stats,
        packing: Packing | None = None,
        disk: DiskTiles | None = None,
    ) -> None:
        self.host_share = 0.0
        self.packing = packing
        self.begun = False
        self._disk = disk
        self._ahead = ReadAhead(disk)
        self._device = device
        self._ledgers = ledgers
        self._buffers = tuple(buffers)
        self._sizes = sizes
        self._stats = stats
        self._fetched: collections.deque[Fetched] = collections.deque()
        self._in_hand: Piece | None = None  # the buffer that the caller attends now
        self.lent = False
        self._restart(0)

    def _restart(self, layer_idx: int) -> None:
        """Begin a new order at `layer_idx`; fills in flight stay in copy-in's order."""
        self._take_back()
        self._fetched.clear()
        self._ahead.drop()
        self._free = collections.deque(self._buffers)  # also one that Ctrl-C left half fetched
        self._first_layer = layer_idx
        self._turn = 0  # the turn being attended, or next to be
        self._started = 0  # turns whose fetching has started
        # Of each such turn that has not ended: the version of the layer's tokens, and which.
        self._expected: dict[int, tuple[int, Fetch | None]] = {}
        # What is left to fetch of the newest of these turns.
        self._rest: Iterator[Tile] = iter(())

    def _layer_of(self, turn: int) -> Ledger:
        return self._ledgers[(self._first_layer + turn) % len(self._ledgers)]

    def begin(self, ledger: Ledger, step: Fetch) -> None:
        """Turn to a layer, and start over where it was not the one expected or has changed."""
        failed, self.begun = self.begun, True  # first: what is interrupted from here on has failed
        if self.lent:  # compute has what others did with the buffers behind it
            self._device.copy_in.wait(self._device.compute.record(), Edge.TILE_FREE)
            self.lent = False
        if not failed:
            self._pass_by(ledger)
        state, turn = (ledger.version, step), self._turn
        unexpected = failed or self._layer_of(turn) is not ledger
        if unexpected or self._expected.get(turn, state) != state:
            self._restart(self._ledgers.index(ledger))
        if self._started == self._turn:
            self._start(ledger, step)
        self._left = step.end - step.start
        self._fetch_ahead()

    def _pass_by(self, ledger: Ledger) -> None:
        """End the turns of layers that are expected to stream nothing, up to a layer's own."""
        while self._turn < self._started:
            if self._layer_of(self._turn) is ledger or self._expected[self._turn][1] is not None:
                return
            self._advance()

    def _start(self, ledger: Ledger, step: Fetch | None) -> None:
        """Have the tiles of one turn more fetched next."""
        self._expected[self._started] = ledger.version, step
        self._started += 1
        self._newest = ledger
        self._rest = iter(())
        if step is not None:
            groups = head_groups(ledger.geometry.kv_heads, step.heads)
            self._rest = ledger.host_tiles(
                step.start, step.end, max_tokens=step.tile_tokens, groups=groups
            )

    def _fetch_ahead(self) -> None:
        """Fill free buffers with the tiles that come next, as far as they are known."""
        while self._free:
            taken = self._ahead.take(self._next)
            if taken is None:
                return
            (turn, ledger, stored), read = taken
            source = None if read is None or self._disk is None else self._disk.end(read)
            buffer, capacity = self._free.popleft(), self._sizes.tile_tokens
            self._fetched.append(
                fetch(self._device, ledger, stored, buffer, capacity, self._stats, turn, source)
            )
            if read is not None and self._disk is not None:
                self._disk.copied(read)

    def _next(self) -> Next | None:
        """Return the tile behind all that were taken, as far as it is known."""
        while True:
            stored = next(self._rest, None)
            if stored is not None:
                return Next(self._started - 1, self._newest, stored)
            if self._started >= self._turn + len(self._ledgers):
                return None
            ledger = self._layer_of(self._started)
            self._start(ledger, fetched_by(ledger.held, self._sizes, self.host_share))

    def tiles(self, ledger: Ledger, heads: slice) -> Iterator[Tile]:
        """Yield tiles as they arrive on the device, while the next ones are on their way."""
        compute, checks = self._device.compute, self._device.checks_accesses
        left, packing = self._left, self.packing
        while left:
            # With no tile in the caller's hands, what is not fetched by now does not exist.
            turn, tile, buffer, filled = self._fetched.popleft()
            assert turn == self._turn, "the tile is of another layer"
            self._in_hand = buffer
            compute.wait(filled, Edge.TILE_FILLED)
            if checks:
                compute.reads(buffer.memory, "attention to a tile")
            left -= tile.tokens
            there = tile if packing is None else packing.dense(ledger, tile)
            if there is tile:
                yield tile
            buffer.free = compute.record()
            self._free.append(buffer)
            self._in_hand = None
            self._fetch_ahead()
            if there is not tile:  # the buffer was done with before
                yield there

    def _take_back(self) -> None:
        """Free the buffer in the caller's hands, where its attention failed."""
        if self._in_hand is not None:
            self._in_hand.free = self._device.compute.record()
            self._in_hand = None

    def end(self) -> None:
        """Finish the turn; fetching may go one turn further."""
        self._advance()
        self.begun = False

    def _advance(self) -> None:
        self._expected.pop(self._turn, None)
        self._turn += 1
        self._fetch_ahead()

    def drop(self) -> None:
        """Forget what was fetched ahead."""
        self._restart(0)
        self.begun = False

    def lend(self) -> tuple[Piece, ...]:
        """Return the staging buffers until the next `begin`."""
        if not self.lent:
            self.drop()
            self.lent = True
        return self._buffers
