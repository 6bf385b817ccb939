"""From where tokens lie to what a pass does with them: pure arithmetic, without tensors.

The engine runs these steps and the planner prices them, so that the two cannot differ. The steps of
one track depend on `Held` and `Sizes`. Where both are equal, as in most layers of a model, the
steps are equal.
"""

import enum
from collections.abc import Sequence
from typing import NamedTuple

from headinfer.schedule.steps import (
    Answer,
    Ask,
    Attend,
    Band,
    Decode,
    Fetch,
    Keep,
    Near,
    Own,
    Part,
    Run,
    Schedule,
    SendHome,
    Step,
    Tiles,
    TrackSteps,
    Where,
)
from headinfer.schedule.track import Track

MAX_ASKED_TOKENS = 16
"""New tokens up to which the host can help: more make it compute instead of read."""


STEADY_TOKENS = 1024
"""Tokens for which what is streamed stays as it is, though some are sent home meanwhile. A captured
step serves so long."""

_STEADY_FROM = 8
"""Times as many tokens there are beside the residents, at least: what is off is then little."""


class Pass(enum.Enum):
    """A kind of call of the model: what it does with its new tokens."""

    FORWARD = "attend all tokens, and keep the new ones"
    APPEND = "keep the new tokens, and attend nothing"
    DRAFT = "attend copies of some tokens, and keep the new one behind these, uncounted"


class Sizes(NamedTuple):
    """A plan's sizes that steps depend on.

    Attributes:
        tile_heads: KV heads of a tile.
        tile_tokens: tokens of a tile.
        page_tokens: tokens of the page behind which new tokens wait to be sent home; the most new
            tokens that go there.
        in_place: whether the device attends host memory where it lies.
    """

    tile_heads: int
    tile_tokens: int
    page_tokens: int
    in_place: bool = False


class Held(NamedTuple):
    """A track's tokens in numbers: how many of them lie where.

    Attributes:
        track: the heads, and how far back they see. A window lies on the device as a whole.
        tokens: in all.
        host_tokens: the oldest, which the host holds.
        resident_tokens: the oldest, which the device holds.
        resident_capacity: tokens that could be resident.
        paged: whether tokens lie in a page: those behind the host's.
        wanting_tokens: tokens that the host's last page of packed ones wants to be full; 0 where
            it is, or tokens are not packed.
        disk_tokens: the oldest, which the host cannot attend: they lie on the disk, or will once it
            holds all.
    """

    track: Track
    tokens: int = 0
    host_tokens: int = 0
    resident_tokens: int = 0
    resident_capacity: int = 0
    paged: bool = False
    wanting_tokens: int = 0
    disk_tokens: int = 0

    @property
    def tail_tokens(self) -> int:
        """Tokens that the host lacks."""
        return self.tokens - self.host_tokens

    @property
    def all_resident(self) -> bool:
        """Whether the residents are all tokens."""
        return not self.paged and self.tokens == self.resident_tokens

    def has_room(self, new_tokens: int) -> bool:
        """Whether new tokens fit behind the residents, if these are all there is."""
        return self.all_resident and self.tokens + new_tokens <= self.resident_capacity

    def streamed(self, host_share: float) -> tuple[int, int]:
        """Return the first token that comes over the link, and one past the last.

        Args:
            host_share: share of the host's tokens beside the residents, the newest of them, which
                the host attends.
        """
        # The tail's tokens may be resident before the host has them.
        first = min(self.resident_tokens, self.host_tokens)
        end = self.host_tokens
        if self.steady and host_share:  # the newest are the host's, until there are more of them
            end = max(end - end % STEADY_TOKENS, first)
        end -= int(host_share * (end - first))
        return first, max(end, self.disk_tokens)

    @property
    def steady(self) -> bool:
        """Whether so many tokens are not resident that what is streamed may stay a while."""
        return self.host_tokens - self.resident_tokens >= _STEADY_FROM * STEADY_TOKENS

    def sent_home(self) -> "Held":
        """Return where tokens lie once the host holds all; a page's may become resident."""
        resident = self.resident_tokens
        if self.paged and self.host_tokens == resident:
            resident = min(self.resident_capacity, self.tokens)
        home = self._replace(host_tokens=self.tokens, resident_tokens=resident, paged=False)
        return home._replace(wanting_tokens=0)  # nobody knows: the next steps are made anew


def route(
    tracks: Sequence[Held], kind: Pass, new_tokens: int, sizes: Sizes, host_share: float = 0.0
) -> Schedule:
    """Return what a pass does, layer by layer.

    Args:
        tracks: of each layer that attends, where its tokens lie.
        kind: of pass.
        new_tokens: that pass at once; no more than a chunk.
        sizes: of tiles and pages.
        host_share: share of the tokens beside the residents that the host attends, if it may.
    """
    alike: dict[Held, list[int]] = {}
    for layer, held in enumerate(tracks):
        alike.setdefault(held, []).append(layer)
    runs = [
        Run(tuple(layers), route_track(held, kind, new_tokens, sizes, host_share))
        for held, layers in alike.items()
    ]
    return Schedule(tuple(runs))


def route_track(
    held: Held, kind: Pass, new_tokens: int, sizes: Sizes, host_share: float = 0.0
) -> TrackSteps:
    """Return what a pass does with one track; see `route`."""
    if held.track.window_tokens is not None:
        return _windowed(held, kind, new_tokens)
    if kind is Pass.DRAFT:
        assert new_tokens == 1, "tokens are drafted one by one"
        return TrackSteps((Decode(Where.DRAFT),))
    if sizes.in_place:
        return _in_place(held, kind, new_tokens, sizes)
    steps: list[Step] = []
    before = held
    if held.tail_tokens and held.tail_tokens + new_tokens > sizes.page_tokens:
        held = held.sent_home()
    where = _place(held, new_tokens, sizes)
    if held is not before:
        steps.append(SendHome(before.host_tokens, before.tokens, turn=where is Where.PAGE))
    keep: list[Step] = [Keep(where)]
    start, end = held.host_tokens, held.tokens + new_tokens
    if where is Where.PAGE and held.tail_tokens and not held.paged:
        # A page cannot begin behind residents that the host lacks.
        keep.insert(0, SendHome(start, held.tokens))
        start = held.tokens
    if kind is Pass.APPEND:
        steps += keep
    elif new_tokens == 1 and where is Where.RESIDENT:
        steps.append(Decode(where))
    else:
        share = host_share if new_tokens <= MAX_ASKED_TOKENS else 0.0
        attend = _attended(held, new_tokens, sizes, share, where)
        # A single new token sees all others and itself: it is one of them before it is attended.
        steps += [*keep, *attend] if new_tokens == 1 else [*attend, *keep]
    few = kind is Pass.FORWARD and 1 < new_tokens <= MAX_ASKED_TOKENS  # they may be taken back
    full = end - start in _sent_at(held, sizes) and not few
    if new_tokens > sizes.page_tokens or full:
        steps.append(SendHome(start, end, late=where is Where.RESIDENT))
    moved = any(isinstance(step, SendHome) for step in steps)
    if moved:
        return TrackSteps(tuple(steps), held.tokens, held.tokens + 1)
    return TrackSteps(tuple(steps), *_serving(held, where, new_tokens, sizes))


def _sent_at(held: Held, sizes: Sizes) -> tuple[int, ...]:
    """Return at how many tokens a tail is sent home: where it is full, or fills a packed page."""
    wanting = held.wanting_tokens
    return (wanting, sizes.page_tokens) if 0 < wanting < sizes.page_tokens else (sizes.page_tokens,)


def _serving(held: Held, where: Where, new_tokens: int, sizes: Sizes) -> tuple[int, int]:
    """Return the numbers of tokens from and before which steps serve that send nothing home."""
    few = 1 < new_tokens <= MAX_ASKED_TOKENS  # a page that they fill stays, until others come
    sent_at = (sizes.page_tokens,) if few else _sent_at(held, sizes)
    ends = [held.host_tokens + tokens - new_tokens + few for tokens in sent_at]
    end = next((end for end in ends if end > held.tokens), ends[-1])
    first = max((passed + 1 for passed in ends if passed < held.tokens), default=0)
    if where is Where.RESIDENT:
        end = min(end, held.resident_capacity - new_tokens + 1)
    if new_tokens > 1 and held.tail_tokens == 0:
        return held.tokens, held.tokens + 1  # the tail is attended from its first token on
    attended = held.tail_tokens > 0 and (held.paged or new_tokens > 1)
    return max(held.host_tokens + attended, first), end


def _place(held: Held, new_tokens: int, sizes: Sizes) -> Where:
    """Return where new tokens are kept: behind the residents while all of them fit there."""
    if held.has_room(new_tokens):
        return Where.RESIDENT
    return Where.CHUNK_PAGE if new_tokens > sizes.page_tokens else Where.PAGE


def _attended(
    held: Held,
    new_tokens: int,
    sizes: Sizes,
    host_share: float,
    where: Where,
) -> list[Step]:
    """Return the steps that attend new tokens, to be kept in a place, to all they see."""
    fetch = fetched(held, sizes, host_share)
    _, end = held.streamed(host_share)
    asks = end < held.host_tokens
    parts: list[Part] = [Own()] if new_tokens > 1 else []
    one = new_tokens == 1  # it has been kept by now
    if held.resident_tokens or (one and where is Where.RESIDENT):
        parts.append(Near(Where.RESIDENT))
    if held.paged or (one and where is Where.PAGE):
        parts.append(Near(Where.PAGE))
    if fetch is not None:
        parts.append(Tiles())
    # What is not streamed is on the device for all heads, and few tokens need no groups.
    heads = held.track.kv_heads
    if fetch is not None or new_tokens > sizes.page_tokens:
        heads = min(sizes.tile_heads, heads)
    attend = Attend(heads, -(-held.track.kv_heads // heads), tuple(parts), write=not asks)
    steps: list[Step] = [attend] if fetch is None else [fetch, attend]
    return [Ask(end, held.host_tokens), *steps, Answer()] if asks else steps


def growing_end(start: int, end: int) -> int:
    """Return the end of streamed tokens with room for more, the same while these come.

    Args:
        start: the first of them.
        end: one past the last.
    """
    return start + ((end - start) // STEADY_TOKENS + 1) * STEADY_TOKENS


def stays(held: Held, steps: Sequence[Step]) -> bool:
    """Whether the steps of a new token stay as they are for `STEADY_TOKENS`, but for lengths."""
    asks = any(isinstance(step, Ask) for step in steps)
    tiles = [step.tile_tokens for step in steps if isinstance(step, Fetch)]
    return held.steady and (asks or all(tokens >= STEADY_TOKENS for tokens in tiles))


def keeps_in_page(held: Held, steps: Sequence[Step]) -> bool:
    """Whether new tokens come behind others in their page, and nothing is sent home for them.

    An empty page is not attended before them. To attend nothing there would shift all that follows.
    """
    moves = any(isinstance(step, SendHome) for step in steps)
    return held.paged and not moves and Keep(Where.PAGE) in steps


def fetched(held: Held, sizes: Sizes, host_share: float) -> Fetch | None:
    """Return what a forward pass fetches for one track; None for nothing."""
    start, end = held.streamed(host_share)
    if start == end:
        return None
    heads = min(sizes.tile_heads, held.track.kv_heads)
    return Fetch(start, end, sizes.tile_tokens, heads, -(-held.track.kv_heads // heads))


def _windowed(held: Held, kind: Pass, new_tokens: int) -> TrackSteps:
    """Return the steps of a window; new tokens are sinks, or come behind all of them."""
    if kind is Pass.APPEND:
        return TrackSteps((Keep(Where.WINDOW),))
    if new_tokens == 1:
        return TrackSteps((Decode(Where.WINDOW),))
    kv_heads, sink_tokens = held.track.kv_heads, held.track.sink_tokens
    if held.tokens < sink_tokens:
        assert held.tokens + new_tokens <= sink_tokens
        band = Attend(kv_heads, 1, (Band(),))
        return TrackSteps((Keep(Where.WINDOW), band), 0, sink_tokens)
    parts: tuple[Part, ...] = (Near(Where.SINKS), Band()) if sink_tokens else (Band(),)
    return TrackSteps((Keep(Where.WINDOW), Attend(kv_heads, 1, parts)), sink_tokens)


def _in_place(held: Held, kind: Pass, new_tokens: int, sizes: Sizes) -> TrackSteps:
    """Return the steps where host memory is attended as it is: all of it is on the device."""
    keep = Keep(Where.HOST)
    if kind is Pass.APPEND:
        return TrackSteps((keep,))
    heads = min(sizes.tile_heads, held.track.kv_heads)
    groups = -(-held.track.kv_heads // heads)
    if new_tokens == 1:
        return TrackSteps((keep, Attend(heads, groups, (Tiles(),))))
    if not held.tokens:
        return TrackSteps((Attend(heads, groups, (Own(),)), keep), 0, 1)
    return TrackSteps((Attend(heads, groups, (Own(), Tiles())), keep), 1)
