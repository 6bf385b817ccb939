"""A place for drafts: copies of a layer's oldest and newest tokens, and the drafted ones behind.

The order of tokens means nothing to attention, as keys have their positions in them. So the newest
tokens lie in a ring, where a token has one slot, whatever came before it. All slots are full while
drafts come.
"""

from collections.abc import Iterator
from typing import NamedTuple

from headinfer.kv.extent import Extent, Piece
from headinfer.kv.pair import Geometry
from headinfer.plan.memory import draft_sink_tokens


class Stretch(NamedTuple):
    """A stretch of tokens whose copies lie side by side.

    Attributes:
        start: the first of them.
        end: one past the last.
        slot: where the first one's copy lies.
    """

    start: int
    end: int
    slot: int


class DraftExtent(Extent):
    """A place that drafts attend: the sinks, the newest tokens, and the drafted ones.

    What is copied into it is no part of what a ledger counts.

    Args:
        piece: the memory.
        geometry: shape of the layer.
        copied_tokens: tokens that are copied, sinks and newest ones together.
        most_drafted: tokens that may be drafted at once.

    Attributes:
        copied_tokens: tokens that are copied.
        sink_tokens: the oldest of them.
    """

    __slots__ = ("_first", "_has_sinks", "_next", "copied_tokens", "sink_tokens")

    def __init__(
        self, piece: Piece, geometry: Geometry, copied_tokens: int, most_drafted: int
    ) -> None:
        super().__init__(piece, geometry, copied_tokens + most_drafted, 0)
        self.copied_tokens = copied_tokens
        self.sink_tokens = draft_sink_tokens(copied_tokens)
        self.forget()

    @property
    def drafted_tokens(self) -> int:
        """Tokens that were drafted and not taken back."""
        return max(self.tokens - self.copied_tokens, 0)

    def lacking(self, tokens: int) -> Iterator[Stretch]:
        """Yield what must be copied for drafts behind `tokens` tokens of the layer.

        Args:
            tokens: of the layer, which has more than are copied.
        """
        assert tokens > self.copied_tokens
        if not self._has_sinks and self.sink_tokens:
            yield Stretch(0, self.sink_tokens, 0)
        first = tokens - (self.copied_tokens - self.sink_tokens)
        start, end = max(self._first, first), self._next
        if start >= end:  # none is there of those that are needed
            start = end = tokens
        yield from self._in_ring(first, start)
        yield from self._in_ring(end, tokens)

    def _in_ring(self, start: int, end: int) -> Iterator[Stretch]:
        ring_tokens = self.copied_tokens - self.sink_tokens
        while start < end:
            at = (start - self.sink_tokens) % ring_tokens
            stop = min(end, start + ring_tokens - at)
            yield Stretch(start, stop, self.sink_tokens + at)
            start = stop

    def begin(self, tokens: int) -> None:
        """Note that what was lacking is there, and that drafts come behind `tokens` tokens."""
        self._has_sinks = True
        self._first = tokens - (self.copied_tokens - self.sink_tokens)
        self._next = tokens
        self.tokens = self.copied_tokens

    def crop(self, tokens: int) -> None:
        """Note that the layer keeps its first `tokens` tokens alone."""
        self._has_sinks = self._has_sinks and tokens >= self.sink_tokens
        self._next = min(self._next, tokens)

    def forget(self) -> None:
        """Note that the layer's tokens are others now."""
        self._has_sinks, self._first, self._next, self.tokens = False, 0, 0, 0


class Drafted:
    """A layer's place for drafts; see `Ledger`.

    Attributes:
        geometry: shape and dtype.
        draft: where drafts are attended and kept, beside all that is counted; None for nowhere.
        firm_tokens: tokens that are no drafts; None while none are drafted. A window has drafts
            among its own.
    """

    geometry: Geometry
    draft: DraftExtent | None = None
    firm_tokens: int | None = None

    def keep_drafts(self, piece: Piece, copied_tokens: int, most_drafted: int) -> None:
        """Have device memory for drafts, with nothing in it."""
        self.draft = DraftExtent(piece, self.geometry, copied_tokens, most_drafted)

    @property
    def drafted_tokens(self) -> int:
        """Tokens that were drafted and not taken back, beside those of the ledger."""
        return 0 if self.draft is None else self.draft.drafted_tokens
