"""Where the tokens of a layer lie: the one thing that knows, and the only one that changes it.

A token may lie in two places at once. The oldest ones are resident on the device and on the host,
too, so that giving them up costs no copy. The host lacks the newest tokens, the layer's *tail*. The
tail lies behind the resident tokens while there is room, and in a page after that.
"""

from dataclasses import replace

from headinfer.kv.drafts import Drafted
from headinfer.kv.extent import Extent, Piece, Tile
from headinfer.kv.host_tokens import HostTokens
from headinfer.kv.pair import KV, Geometry
from headinfer.kv.place import HostPlace
from headinfer.plan.format import Format
from headinfer.schedule.route import Held
from headinfer.schedule.track import Track


class Ledger(HostTokens, Drafted):
    """A record of the extents that hold one layer's tokens; together they cover all, without a gap.

    It moves no bytes but those of rows: who copies or computes tokens enters them here. Methods
    that change what the host holds, but for `extend_host`, must be called with no work in flight
    that touches it.

    Args:
        geometry: shape and dtype.
        place: gives host memory.
        window_tokens: tokens that a query sees, its own included; None for all. With a window all
            tokens lie in the tail, and older ones than are seen may be forgotten.
        sink_tokens: the oldest tokens, which a query sees beside its window. They lie before the
            window's in the tail.
        host_format: in which tokens lie in host memory.

    Attributes:
        geometry: shape and dtype; its batch follows the selection of rows.
        home: the same for host memory.
        track: the heads, and how far back they see.
        host_tokens: tokens that the host holds: those from 0 to before it.
        resident: the oldest tokens on the device; None where none are kept there.
        tail: a page on the device with the tokens that follow those of the host; None where there
            are none, or they are resident.
        draft: copies of some tokens, for drafts; see `Drafted`.
        half_done: whether a change of where tokens lie has begun and not ended, as after Ctrl-C:
            what the ledger says may not be so.
        coming: host memory that was asked for, and not taken yet.
        version: changes with what the host holds, so that tiles fetched ahead can be told stale.
    """

    def __init__(
        self,
        geometry: Geometry,
        place: HostPlace,
        window_tokens: int | None = None,
        sink_tokens: int = 0,
        host_format: Format = Format.DENSE,
    ) -> None:
        self.geometry = geometry
        dense = host_format is geometry.format
        self.home = geometry if dense else replace(geometry, format=host_format)
        self.track = Track(geometry.kv_heads, window_tokens, sink_tokens)
        self.host_tokens = 0
        self.resident: Extent | None = None
        self.tail: Extent | None = None
        self.half_done = False
        self.version = 0
        self._place = place
        self._host: list[Extent] = []
        self.coming = place.coming()
        self._written_tokens = 0

    @property
    def tokens(self) -> int:
        """Tokens in all."""
        tail, resident = self.tail, self.resident
        if tail is not None:
            return tail.start + tail.tokens
        return self.host_tokens if resident is None else max(self.host_tokens, resident.tokens)

    @property
    def tail_tokens(self) -> int:
        """Tokens that only the device has: those behind the host's."""
        tail, resident = self.tail, self.resident
        if tail is not None:
            return tail.tokens
        return 0 if resident is None else max(resident.tokens - self.host_tokens, 0)

    @property
    def past_tokens(self) -> int:
        """Past tokens that a query sees through the window."""
        assert self.track.window_tokens is not None
        return self.track.window_tokens - 1

    def can_crop(self, tokens: int) -> bool:
        """Whether the tokens seen through the window are there once only `tokens` are left."""
        return tokens <= self.track.sink_tokens or tokens >= self.earliest_crop

    @property
    def earliest_crop(self) -> int:
        """The fewest tokens, but for none, that can be left."""
        tail = self.tail
        if self.track.window_tokens is None or tail is None or not tail.start:
            return 0
        return tail.start + self.track.sink_tokens + self.past_tokens

    @property
    def held(self) -> Held:
        """Where the tokens lie, in numbers."""
        resident, tail = self.resident, self.tail
        tokens, host_tokens, dense = self.tokens, self.host_tokens, self.home.format.row_tokens == 1
        return Held(
            track=self.track,
            tokens=tokens,
            host_tokens=host_tokens,
            resident_tokens=0 if resident is None else resident.tokens,
            resident_capacity=0 if resident is None else resident.capacity,
            paged=tail is not None and tail.tokens > 0,
            wanting_tokens=0 if dense else self.wanting_tokens(host_tokens),
            disk_tokens=self.disk_tokens_of(tokens) if self._place.block_tokens else 0,
        )

    @property
    def sink_tokens(self) -> int:
        """Tokens at the beginning of the tail that queries see beside a window.

        None while there are fewer tokens than sinks: all of them are seen then.
        """
        sink_tokens = self.track.sink_tokens
        return sink_tokens if sink_tokens <= self.tokens else 0

    @property
    def visible_tokens(self) -> int:
        """Past tokens that the next query sees; through its window, where it has one."""
        tokens = self.tokens
        if self.track.window_tokens is None or tokens < self.track.sink_tokens:
            return tokens
        return min(tokens - self.track.sink_tokens, self.past_tokens)

    def select_window(self, geometry: Geometry, target: Extent | None) -> None:
        """Go on with other rows of a window's tokens.

        Args:
            geometry: of these rows.
            target: has them; None where there are no tokens.
        """
        if target is not None and self.tail is not None:
            target.tokens = self.tail.tokens
        self.geometry, self.tail = geometry, target

    def keep_residents(self, piece: Piece, capacity: int, whole: KV | None = None) -> None:
        """Have device memory for the oldest `capacity` tokens, none of which is there yet.

        Args:
            piece: the memory.
            capacity: tokens there is memory for.
            whole: its views, where they were made already.
        """
        self.resident = Extent(piece, self.geometry, capacity, 0, whole)

    def begin_tail(self, piece: Piece, capacity: int) -> Extent:
        """Have a page on the device for tokens that follow all others; return it, empty."""
        assert self.tail is None
        self.tail = Extent(piece, self.geometry, capacity, self.tokens)
        return self.tail

    def restart_tail(self, start: int) -> None:
        """Empty the tail but for its sinks, and have token `start` come behind these.

        The tokens between are forgotten.
        """
        assert self.tail is not None
        sink_tokens = self.sink_tokens
        self.tail.start, self.tail.tokens = start - sink_tokens, sink_tokens

    def end_tail(self) -> None:
        """Let go of the tail's page: the host holds its tokens now."""
        assert self.tail is None or self.tail.end == self.host_tokens
        self.tail = None

    def drop_device(self) -> None:
        """Let go of all device memory: the host holds all tokens."""
        assert not self.tail_tokens
        self.resident = self.tail = self.draft = None

    def lengthen(self, extent: Extent, tokens: int) -> None:
        """Have the tail or the residents hold some tokens more."""
        extent.tokens += tokens
        assert extent.tokens <= extent.capacity, "the extent has no memory for them"

    def extend(self, extent: Extent, tokens: int) -> Tile:
        """Lengthen the tail or the residents; return where the new tokens must be written."""
        first = extent.tokens
        self.lengthen(extent, tokens)
        return Tile(extent.start + first, tokens, extent.piece, extent.whole, first)

    def next_tile(self, extent: Extent) -> Tile:
        """Return what a single new token sees, of an extent that has all of it.

        The last place is the token's own, still to be written.
        """
        past = min(self.visible_tokens, extent.tokens)
        return extent.tile(extent.end - past, extent.end + 1)

    def crop(self, tokens: int) -> None:
        """Keep the first `tokens` tokens; the memory stays."""
        assert 0 <= tokens <= self.tokens
        if self.draft is not None:
            self.draft.crop(tokens)
        if self.resident is not None:
            self.resident.tokens = min(self.resident.tokens, tokens)
        if self.tail is not None:
            if tokens <= self.track.sink_tokens:
                self.tail.start = 0  # they lie at its beginning, whatever came behind them
            self.tail.tokens = max(min(self.tail.tokens, tokens - self.tail.start), 0)
            if not self.tail.tokens and not (self.track.window_tokens and tokens):
                self.tail = None
        self.crop_host(tokens)

    def share(self, other: "Ledger") -> None:
        """Hold the tokens that another ledger's host memory holds, in the same memory.

        This ledger must be empty. Whoever of the two first changes what both hold takes memory of
        its own for that. A page that is not full is left out, with memory for a copy.
        """
        assert not self.tokens
        self.clear()
        self._share_host(other)

    def clear(self) -> None:
        """Forget all tokens and give back all host memory; device memory stays."""
        self._clear_host()
        self.tail = None
        if self.draft is not None:
            self.draft.forget()
        if self.resident is not None:
            self.resident.tokens = 0
        self.half_done = False
        self.version += 1
