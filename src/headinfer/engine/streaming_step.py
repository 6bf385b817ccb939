"""A decode step in one capture, though tokens are streamed in it or attended by the host.

What changes from step to step is read from memory. That is the new token's place in its page, the
tokens there and in a layer's last tile, and what the host attends. Numbers that are in a capture
are among what it reads (`StreamedTrack.reads`). Where they change, another is made.
"""

import contextlib
import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from headinfer.attend.partial import Partial
from headinfer.device.base import Device, Edge
from headinfer.engine.attending import attend_groups
from headinfer.engine.chunk import Chunk
from headinfer.engine.fetch import TileSource, head_groups
from headinfer.engine.flagged import FlaggedHost
from headinfer.engine.host_attention import HostAttention
from headinfer.engine.launched import LaunchedKernels
from headinfer.engine.ring import Streamed, TileRing, fill
from headinfer.engine.stats import Stats
from headinfer.kv.extent import Extent, Piece, Tile
from headinfer.kv.ledger import Ledger
from headinfer.schedule.route import growing_end
from headinfer.schedule.steps import Ask, Attend, Fetch, Step, Where


@dataclass(frozen=True, slots=True)
class StreamedTrack:
    """A track whose tokens are not all on the device, and what a step does with it.

    Attributes:
        ledger: of the track.
        page: takes the new token.
        attend: all that it sees.
        fetch: what is fetched of that, with room for tokens to come; None for nothing.
        ask: what the host attends; None for nothing.
        counted_from: position from which the tokens that are fetched are counted in memory.
        memory: `[3]` of int64 on the device, which has the step's `place` when it runs.
    """

    ledger: Ledger
    page: Extent
    attend: Attend
    fetch: Fetch | None
    ask: Ask | None
    counted_from: int
    memory: torch.Tensor

    @classmethod
    def of(
        cls, ledger: Ledger, page: Extent, steps: Sequence[Step], memory: torch.Tensor
    ) -> "StreamedTrack":
        """Return what the steps of a track say."""
        fetch = next((step for step in steps if isinstance(step, Fetch)), None)
        ask = next((step for step in steps if isinstance(step, Ask)), None)
        attend = next(step for step in steps if isinstance(step, Attend))
        counted_from = 0
        if fetch is not None and ask is None:
            limit = min(growing_end(fetch.start, fetch.end), ledger.capacity_tokens)
            tiles = ledger.host_tiles(fetch.start, limit, max_tokens=fetch.tile_tokens)
            last = [tile for tile in tiles if tile.start < fetch.end][-1]
            counted_from = last.start
            fetch = dataclasses.replace(fetch, end=last.start + last.tokens)
        return cls(ledger, page, attend, fetch, ask, counted_from, memory)

    @property
    def reads(self) -> tuple[object, ...]:
        """What a capture reads: memory, and the numbers that are in it."""
        resident, fetch = self.ledger.resident, self.fetch
        pieces: tuple[Piece, ...] = ()
        if fetch is not None:
            pieces = tuple(tile.piece for tile in self.ledger.host_tiles(fetch.start, fetch.end))
        near = () if resident is None else (resident.piece, resident.tokens)
        ask_from = None if self.ask is None else self.ask.start
        return (self.page.piece, *near, self.attend, fetch, ask_from, *pieces)

    @property
    def place(self) -> tuple[int, int, int]:
        """Where the new token goes in its page, the tokens there with it, and a last tile's."""
        tokens = self.page.tokens
        return tokens, tokens + 1, self.ledger.host_tokens - self.counted_from

    def groups(self) -> Iterator[list[Tile]]:
        """Yield the tiles of each group of heads, the last one's tokens counted in memory."""
        fetch, ledger = self.fetch, self.ledger
        if fetch is None:
            return
        for heads in head_groups(ledger.geometry.kv_heads, fetch.heads):
            tiles = list(
                ledger.host_tiles(
                    fetch.start, fetch.end, max_tokens=fetch.tile_tokens, groups=(heads,)
                )
            )
            if self.ask is None:
                tiles[-1] = tiles[-1]._replace(counted=self.memory[2:])
            yield tiles


def _tiles(tracks: Sequence[StreamedTrack]) -> Iterator[Streamed]:
    """Yield the tiles of a step, in the order in which they are attended."""
    for track in tracks:
        if track.fetch is not None:
            for group in track.groups():
                for tile in group:
                    yield Streamed(track.ledger, tile, track.fetch.tile_tokens)


class _Tokens:
    """A token of a track, and where it finds what it sees in a captured step.

    See `attending.Tokens`.
    """

    def __init__(
        self,
        track: StreamedTrack,
        chunk: Chunk,
        ring: TileRing,
        device: Device,
    ) -> None:
        self.chunk = chunk
        self._track, self._ring, self._device = track, ring, device
        self._tiles = [len(tiles) for tiles in track.groups()]

    def near(self, where: Where) -> Tile:
        """Return the residents, or the page with as many tokens as memory says."""
        if where is Where.PAGE:
            page = self._track.page
            tile = page.tile(page.start, page.limit)._replace(counted=self._track.memory[1:2])
        else:
            resident = self._track.ledger.resident
            assert resident is not None
            tile = Tile(resident.start, resident.tokens, resident.piece, resident.whole)
        self._device.compute.reads(tile.piece.memory, "attention to tokens kept here")
        return tile

    def tiles(self, heads: slice) -> Iterator[Tile]:
        """Yield the tiles of the next group of heads."""
        return self._ring.take(self._tiles.pop(0))


class StreamingStep:
    """A cache's streamed steps: what they share, and the one that is being captured or run.

    Args:
        device: where attention is computed.
        source: lends its buffers.
        host: gives the memory for queries and answers.
        stats: where bytes are counted.

    Attributes:
        failed: whether a step was broken off while it was enqueued or captured.
    """

    _ring: TileRing

    def __init__(
        self, device: Device, source: TileSource, host: HostAttention, stats: Stats
    ) -> None:
        self._device, self._source, self._host, self._stats = device, source, host, stats
        self._flagged: FlaggedHost | None = None
        self.failed = False
        self._asks = False
        self._next_ask = 0
        self._fetched_bytes = 0
        self._state: tuple[object, ...] = ()  # whose first tiles the buffers have
        self._filled = False  # whether they do

    def prepare(self, tracks: Sequence[StreamedTrack], *, runs: bool) -> None:
        """Make the device ready for a step, right before it is enqueued or captured.

        Args:
            tracks: of the step, in order.
            runs: whether it is enqueued.
        """
        device = self._device
        self.fill(tracks)
        asked = [(track.ledger, track.ask) for track in tracks if track.ask is not None]
        if asked and self._flagged is None:
            self._flagged = FlaggedHost(device, self._host, self._stats, len(asked))
        self._asks = bool(asked)
        if self._flagged is not None and asked:
            self._flagged.refresh(asked)
        for stream in (device.copy_in, device.copy_out, device.host_work):
            device.compute.wait(stream.record(), Edge.STEP_READY)
        if runs:
            self.failed = True  # until it ran
            if self._flagged is not None and asked:
                self._flagged.expect()

    def ran(self) -> None:
        """Note that the step was enqueued as a whole."""
        self.failed = False

    def serves(self, tracks: Sequence[StreamedTrack]) -> bool:
        """Whether steps of these tracks can go on with it."""
        asking = sum(track.ask is not None for track in tracks)
        other = self._flagged is not None and asking and self._flagged.count != asking
        return not self.failed and not other

    def rest(self) -> None:
        """Sleep until the host has done its part of the step."""
        if self._flagged is not None and self._asks:
            self._flagged.rest()

    def fill(self, tracks: Sequence[StreamedTrack]) -> None:
        """Have the buffers filled with the first tiles of a step, if they are not."""
        state = tuple((track.ledger, track.ledger.version, track.fetch) for track in tracks)
        if not self._filled or self._state != state or not self._source.lent:
            self._filled = False
            buffers = self._source.lend()
            tiles = list(itertools.islice(_tiles(tracks), len(buffers)))
            self._stats.bytes_to_device += fill(self._device, buffers, tiles)
            self._state, self._filled = state, True

    @contextlib.contextmanager
    def step(self, tracks: Sequence[StreamedTrack]) -> Iterator[None]:
        """Have a step enqueued or captured within, whose streamed tracks are these."""
        self.failed = True  # until it has ended
        self._begin(tracks)
        yield
        self._ring.end()  # host work ended with its last answer
        del self._ring
        self.ran()

    def _begin(self, tracks: Sequence[StreamedTrack]) -> None:
        self._next_ask = 0
        buffers, tiles = self._source.lend(), list(_tiles(tracks))
        self._fetched_bytes = sum(each.num_bytes for each in tiles)
        if len(tiles) <= len(buffers):
            self._fetched_bytes = 0
        self._ring = TileRing(self._device, buffers, tiles, self._source.packing)

    def attend(self, track: StreamedTrack, chunk: Chunk) -> None:
        """Keep a token in its page, and attend it."""
        device, page = self._device, track.page
        device.compute.writes(page.piece.memory, "new tokens")
        for tokens, token in zip(page.whole, chunk.new, strict=True):
            tokens.index_copy_(2, track.memory[:1], token)
        kernels = LaunchedKernels(chunk.kernels, device)
        chunk = dataclasses.replace(chunk, kernels=kernels, waiting=[])
        tokens_seen = _Tokens(track, chunk, self._ring, device)
        if track.ask is None:
            attend_groups(tokens_seen, track.attend)
            return
        flagged = self._flagged
        assert flagged is not None
        asked = flagged.ask(self._next_ask, track.ledger, track.ask, chunk)
        self._next_ask += 1
        attend_groups(tokens_seen, track.attend)
        answer = flagged.answer(asked)
        for heads, total in chunk.waiting:
            total.add(Partial(answer.out[:, heads], answer.lse[:, heads]))
            chunk.finish(heads, total)

    def count_step(self) -> None:
        """Count what a replay moves and attends."""
        self._stats.bytes_to_device += self._fetched_bytes
        if self._flagged is not None and self._asks:
            self._flagged.count_step()

    def end(self) -> None:
        """Let go of the host's thread; no step may be under way."""
        if self._flagged is not None:
            self._flagged.end()
            self._flagged = None
