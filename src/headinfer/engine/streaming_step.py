"""A decode step in one capture, though tokens are streamed in it or attended by the host.

What changes from step to step is read from memory. That is the new tokens' places in their page,
the tokens there and in a layer's last tile, and what the host attends. Numbers that are in a
capture are among what it reads (`StreamedTrack.reads`). Where they change, another is made.
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
from headinfer.engine.one_launch_share import StepTimes
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
        page: takes the new tokens: a page, or residents that are all they see.
        attend: all that they see.
        fetch: what is fetched of that, with room for tokens to come; None for nothing.
        ask: what the host attends; None for nothing.
        counted_from: position from which the tokens that are fetched are counted in memory.
        memory: `[2 + new_tokens]` of int64 on the device, which has the step's `place` when it
            runs.
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
        if resident is self.page:
            return self.page.piece, self.attend
        pieces: tuple[Piece, ...] = ()
        if fetch is not None:
            pieces = tuple(tile.piece for tile in self.ledger.host_tiles(fetch.start, fetch.end))
        near = () if resident is None else (resident.piece, resident.tokens)
        ask_from = None if self.ask is None else self.ask.start
        return (self.page.piece, *near, self.attend, fetch, ask_from, *pieces)

    @property
    def place(self) -> tuple[int, ...]:
        """The tokens that are attended in the page, a last tile's, and where the new ones go.

        One new token is among those in the page. Several attend each other by themselves.
        """
        tokens, new_tokens = self.page.tokens, self.new_tokens
        attended = tokens + 1 if new_tokens == 1 else tokens
        last = self.ledger.host_tokens - self.counted_from
        return attended, last, *range(tokens, tokens + new_tokens)

    @property
    def new_tokens(self) -> int:
        """New tokens of each row."""
        return self.memory.shape[0] - 2

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
                tiles[-1] = tiles[-1]._replace(counted=self.memory[1:2])
            yield tiles


def _tiles(tracks: Sequence[StreamedTrack]) -> Iterator[Streamed]:
    """Yield the tiles of a step, in the order in which they are attended."""
    for track in tracks:
        if track.fetch is not None:
            for group in track.groups():
                for tile in group:
                    yield Streamed(track.ledger, tile, track.fetch.tile_tokens)


class _Tokens:
    """A chunk of a track, and where it finds what it sees in a captured step.

    See `attending.Tokens`.
    """

    def __init__(
        self,
        track: StreamedTrack,
        chunk: Chunk,
        ring: TileRing | None,
        device: Device,
    ) -> None:
        self.chunk = chunk
        self._track, self._ring, self._device = track, ring, device
        self._tiles = [len(tiles) for tiles in track.groups()]

    def near(self, where: Where) -> Tile:
        """Return the residents, or the page with as many tokens as memory says."""
        page, resident = self._track.page, self._track.ledger.resident
        if where is Where.PAGE or resident is page:
            tile = page.tile(page.start, page.limit)._replace(counted=self._track.memory[:1])
        else:
            assert resident is not None
            tile = Tile(resident.start, resident.tokens, resident.piece, resident.whole)
        self._device.compute.reads(tile.piece.memory, "attention to tokens kept here")
        return tile

    def tiles(self, heads: slice) -> Iterator[Tile]:
        """Yield the tiles of the next group of heads."""
        assert self._ring is not None
        return self._ring.take(self._tiles.pop(0))


def attend_kept(
    device: Device, track: StreamedTrack, chunk: Chunk, ring: TileRing | None = None
) -> Chunk:
    """Keep new tokens where memory says, and attend them to all that is on the device or comes.

    Args:
        device: which.
        track: of the tokens.
        chunk: the new tokens.
        ring: brings tiles; None where none are streamed.

    Returns:
        The chunk; what the host has to answer first is in `Chunk.waiting`.
    """
    page = track.page
    _state_writes(device, track)
    for tokens, new in zip(page.whole, chunk.new, strict=True):
        tokens.index_copy_(2, track.memory[2:], new)
    kernels = LaunchedKernels(chunk.kernels, device)
    chunk = dataclasses.replace(chunk, kernels=kernels, waiting=[])
    attend_groups(_Tokens(track, chunk, ring, device), track.attend)
    return chunk


def _state_writes(device: Device, track: StreamedTrack) -> None:
    """State, where that is checked, that compute writes the new tokens' places.

    Residents may be on their way home meanwhile, but for those places.
    """
    page = track.page
    if page is not track.ledger.resident:
        device.compute.writes(page.piece.memory, "new tokens")
        return

    def state() -> None:
        for part in page.tile(page.end, page.end + track.new_tokens).kv:
            device.compute.writes(part, "new tokens")

    if device.checks_accesses:
        device.launch(state)


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
        self._hosts: dict[int, FlaggedHost] = {}  # by new tokens, each with queries of its own
        self._flagged: FlaggedHost | None = None  # that of the step; None where nothing is asked
        self.failed = False
        self._next_ask = 0
        self._fetched_bytes: dict[int, int] = {}  # by new tokens
        self._new_tokens = 1  # of the step
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
        self._new_tokens = new_tokens = tracks[0].new_tokens
        if asked and new_tokens not in self._hosts:
            self._hosts[new_tokens] = FlaggedHost(device, self._host, self._stats, len(asked))
        self._flagged = self._hosts[new_tokens] if asked else None
        if self._flagged is not None:
            self._flagged.refresh(asked)
        for stream in (device.copy_in, device.copy_out, device.host_work):
            device.compute.wait(stream.record(), Edge.STEP_READY)
        if runs:
            self.failed = True  # until it ran
            if self._flagged is not None:
                self._flagged.expect()

    def ran(self) -> None:
        """Note that the step was enqueued as a whole."""
        self.failed = False

    def serves(self, tracks: Sequence[StreamedTrack]) -> bool:
        """Whether steps of these tracks can go on with it."""
        asking = sum(track.ask is not None for track in tracks)
        host = self._hosts.get(tracks[0].new_tokens) if asking else None
        return not self.failed and (host is None or host.count == asking)

    def times(self, new_tokens: int) -> StepTimes | None:
        """Return what the host measured in a step of so many new tokens; None for nothing new."""
        host = self._hosts.get(new_tokens)
        return None if host is None else host.times()

    def rest(self) -> None:
        """Sleep until the host has done its part of the step."""
        if self._flagged is not None:
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
        fetched_bytes = sum(each.num_bytes for each in tiles)
        self._fetched_bytes[self._new_tokens] = fetched_bytes if len(tiles) > len(buffers) else 0
        self._ring = TileRing(self._device, buffers, tiles, self._source.packing)

    def attend(self, track: StreamedTrack, chunk: Chunk) -> None:
        """Keep new tokens in their page, and attend them."""
        if track.ask is None:
            attend_kept(self._device, track, chunk, self._ring)
            return
        flagged = self._flagged
        assert flagged is not None
        asked = flagged.ask(self._next_ask, track.ledger, track.ask, chunk)
        self._next_ask += 1
        chunk = attend_kept(self._device, track, chunk, self._ring)
        answer = flagged.answer(asked)
        for heads, total in chunk.waiting:
            total.add(Partial(answer.out[:, heads], answer.lse[:, heads]))
            chunk.finish(heads, total)

    def count_step(self) -> None:
        """Count what a replay moves and attends."""
        self._stats.bytes_to_device += self._fetched_bytes[self._new_tokens]
        if self._flagged is not None:
            self._flagged.count_step()

    def end(self) -> None:
        """Let go of the host's threads; no step may be under way."""
        self._flagged = None
        while self._hosts:
            self._hosts.popitem()[1].end()
