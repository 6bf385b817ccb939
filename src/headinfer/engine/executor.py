"""Running the steps of a schedule on a device: one method for each kind of step.

How tiles come is the business of a `TileSource`: with `OverlappedTiles` copies run ahead of
attention, with `SequentialTiles` everything takes its turn.
"""

from collections.abc import Callable, Iterator
from typing import Any

from headinfer.attend.partial import Partial
from headinfer.attend.work import TokenWork
from headinfer.engine.attending import attend_groups, attention_mark
from headinfer.engine.chunk import Chunk
from headinfer.engine.fetch import TileSource
from headinfer.engine.host_attention import HostAttention
from headinfer.engine.pages import Pages
from headinfer.engine.windows import WindowKeeper
from headinfer.kv.extent import Extent, Tile
from headinfer.kv.ledger import Ledger
from headinfer.kv.pair import KV
from headinfer.plan.format import Format
from headinfer.schedule.route import Held, Pass, Sizes, route_track
from headinfer.schedule.steps import (
    Answer,
    Ask,
    Attend,
    Band,
    Decode,
    Fetch,
    Keep,
    Near,
    SendHome,
    TrackSteps,
    Where,
)

_Key = tuple[int, Pass, int, float]
_Asked = tuple[Held, Pass, int, float]


class Executor:
    """A performer of steps, for one layer's chunk after another.

    `ledger`, and `chunk` or `new`, must be set before a step is performed.

    Args:
        source: of streamed tiles.
        pages: where new tokens go.
        windows: where those of layers with a window go.
        host: attends the host's share.
        sizes: of tiles and pages.

    Attributes:
        source: gives streamed tiles.
        pages: takes new tokens.
        ledger: of the layer whose steps are performed.
        chunk: how its new tokens attend; not looked at where they do not.
        new: the new tokens' keys and values.
    """

    ledger: Ledger
    chunk: Chunk
    new: KV

    def __init__(
        self,
        source: TileSource,
        pages: Pages,
        windows: WindowKeeper,
        host: HostAttention,
        sizes: Sizes,
    ) -> None:
        self.source = source
        self.pages = pages
        self._windows = windows
        self._host = host
        self._sizes = sizes
        # The newest of each layer: older ones may not serve any more (`TrackSteps.serves`).
        self._known: dict[Ledger, tuple[_Key, TrackSteps]] = {}
        self._newest: tuple[_Asked, TrackSteps] | None = None
        self._window: Tile | None = None
        self._late: dict[Ledger, None] = {}  # to be sent home behind the last layer

    def steps_of(
        self, ledger: Ledger, tokens: int, kind: Pass, new_tokens: int, host_share: float
    ) -> TrackSteps:
        """Return what a pass does with a layer; made anew only where its tokens' places changed.

        Args:
            ledger: of the layer.
            tokens: that it holds.
            kind: of pass.
            new_tokens: at once.
            host_share: share of the tokens beside the residents that the host attends.
        """
        # Where host memory is attended in place, its growth moves no token.
        version = 0 if self._sizes.in_place else ledger.version
        key = version, kind, new_tokens, host_share
        known = self._known.get(ledger)
        if known is not None and known[0] == key and known[1].serves(tokens):
            return known[1]
        asked = ledger.held, kind, new_tokens, host_share
        newest = self._newest
        if newest is None or newest[0] != asked:  # most layers ask what the one before did
            newest = self._newest = asked, route_track(*asked[:3], self._sizes, host_share)
        steps = newest[1]
        self._known[ledger] = key, steps
        return steps

    def near(self, where: Where) -> Tile:
        """Return all tokens of a place on the device; see `attending.Tokens`."""
        if where is Where.WINDOW:
            assert self._window is not None
            return self._window
        if where is Where.SINKS:
            return self._windows.sinks(self.ledger)
        return self.pages.near(self.ledger, where)

    def tiles(self, heads: slice) -> Iterator[Tile]:
        """Yield the tiles of some heads; see `attending.Tokens`."""
        return self.source.tiles(self.ledger, heads)

    def _send_home(self, step: SendHome) -> None:
        ledger = self.ledger
        assert (step.start, step.end) == (ledger.host_tokens, ledger.tokens)
        if step.late and ledger.home.format is Format.DENSE:
            self._late[ledger] = None  # what is packed would wait for counts of layers before
        else:
            self.pages.send_home(ledger, turn=step.turn)

    def send_late(self) -> None:
        """Send home what the steps of layers have left to the end of a pass.

        A pass that ended early may have left some to this one, or they were sent since.
        """
        ledgers, self._late = self._late, {}
        if ledgers:
            self.pages.send_residents(ledgers)

    def _keep(self, step: Keep) -> None:
        if step.where is not Where.WINDOW:
            self.pages.keep(self.ledger, self.new, step.where)
        else:
            self._window = self._windows.take(self.ledger, self.new)

    def _ask(self, step: Ask) -> None:
        chunk = self.chunk
        assert chunk.host_kernels is not None
        tiles = list(self.ledger.host_tiles(step.start, step.end))
        assert not any(tile.piece.region for tile in tiles), "the host has no such memory"
        self._host.ask(self.ledger.home, tiles, chunk.query, chunk.host_kernels, chunk.scale)

    def _fetch(self, step: Fetch) -> None:
        self.source.begin(self.ledger, step)

    def with_room(self, where: Where) -> Extent:
        """Return the tokens of a place that has all a new one sees, with room for that one."""
        if where is Where.RESIDENT:
            return self.pages.residents_with_room(self.ledger)
        if where is Where.DRAFT:
            assert self.ledger.draft is not None
            return self.ledger.draft
        return self._windows.window_with_room(self.ledger)

    def _decode(self, step: Decode) -> None:
        """Attend and keep a single token: in one call, if none is padding."""
        ledger, chunk = self.ledger, self.chunk
        if chunk.padding is not None:
            self._keep(Keep(step.where))
            part = Near(step.where) if step.where is Where.RESIDENT else Band()
            attend_groups(self, Attend(ledger.geometry.kv_heads, 1, (part,)))
            return
        extent = self.with_room(step.where)
        tile, sink_tokens = ledger.next_tile(extent), ledger.sink_tokens
        self.pages.state_token(tile)
        ledger.lengthen(extent, 1)
        try:
            with attention_mark():
                chunk.kernels.decode(
                    TokenWork(
                        *(chunk.query, chunk.new, tile, chunk.scale, chunk.out),
                        *(chunk.sinks, sink_tokens),
                    )
                )
        except BaseException:  # its place may never have been written
            if extent is ledger.draft:
                extent.tokens -= 1
            else:
                ledger.crop(chunk.past_tokens)
            raise

    def _answer(self, _step: Answer) -> None:
        answer, chunk = self._host.answer(), self.chunk
        for heads, total in chunk.waiting:
            total.add(Partial(answer.out[:, heads], answer.lse[:, heads]))
            chunk.finish(heads, total)
        chunk.waiting.clear()

    def forget_late(self) -> None:
        """Send none of it: the layers are empty."""
        self._late.clear()

    def release(self) -> None:
        """Let go of the chunk, whose memory is the caller's."""
        self.__dict__.pop("chunk", None)
        self.__dict__.pop("new", None)
        self._window = None


PERFORM: dict[type, Callable[[Executor, Any], None]] = {
    SendHome: Executor._send_home,
    Keep: Executor._keep,
    Ask: Executor._ask,
    Fetch: Executor._fetch,
    Decode: Executor._decode,
    Attend: attend_groups,
    Answer: Executor._answer,
}
"""What performs each kind of step, given the executor and the step."""
