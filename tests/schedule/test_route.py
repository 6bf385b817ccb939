"""Schedules cover what queries may see, each head and token once, and say where tokens go."""

import dataclasses
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headinfer.schedule.route import MAX_ASKED_TOKENS, Held, Pass, Sizes, route, route_track
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
    SendHome,
    Step,
    TrackSteps,
    Where,
)
from headinfer.schedule.track import Track

SIZES = Sizes(tile_heads=1, tile_tokens=16, page_tokens=6)


@dataclasses.dataclass
class Places:
    """Which tokens of one track lie where, moved by steps alone."""

    resident_capacity: int
    window_tokens: int | None = None
    tokens: int = 0
    host: int = 0
    resident: int = 0
    page: range | None = None
    row_tokens: int = 1

    def held(self, kv_heads: int) -> Held:
        return Held(
            Track(kv_heads, self.window_tokens),
            self.tokens,
            self.host,
            self.resident,
            self.resident_capacity,
            self.page is not None,
            -self.host % self.row_tokens,
        )

    def keep(self, where: Where, new: int, sizes: Sizes) -> None:
        start, self.tokens = self.tokens, self.tokens + new
        if where is Where.RESIDENT:
            assert start == self.resident, "the residents are all tokens"
            self.resident += new
            assert self.resident <= self.resident_capacity
            assert self.resident - self.host <= max(sizes.page_tokens, new)
        elif where is Where.HOST:
            assert start == self.host
            self.host += new
        elif where is Where.PAGE:
            first = start if self.page is None else self.page.start
            assert first == self.host, "what is before the page is on the host"
            self.page = range(first, self.tokens)
            assert len(self.page) <= sizes.page_tokens
        elif where is Where.CHUNK_PAGE:
            assert self.page is None
            assert start == self.host
            self.page = range(start, self.tokens)
        else:
            assert self.window_tokens is not None

    def send(self, step: SendHome) -> None:
        assert (step.start, step.end) == (self.host, self.tokens), "the host lacks just these"
        if self.page is not None and self.page.start == self.resident:
            self.resident = min(self.tokens, self.resident_capacity)
        self.host, self.page = self.tokens, None


def run(
    steps: tuple[Step, ...], places: Places, kv_heads: int, new: int, sizes: Sizes
) -> tuple[Counter[tuple[int, int]], bool]:
    """Perform steps; return how often each head and token was attended, the new ones alike.

    Also whether the new tokens were attended to each other.
    """
    seen: Counter[tuple[int, int]] = Counter()
    first_new, own, fetched, asked = places.tokens, False, None, None
    kept = False
    for step in steps:
        if isinstance(step, Keep):
            places.keep(step.where, new, sizes)
            kept = True
        elif isinstance(step, SendHome):
            places.send(step)
        elif isinstance(step, Ask):
            assert step.end <= places.host
            asked = range(step.start, step.end)
            assert asked
        elif isinstance(step, Fetch):
            assert step.end <= places.host
            fetched = step
        elif isinstance(step, Decode):
            assert step.where is not Where.DRAFT, "a draft is no part of what is counted"
            places.keep(step.where, 1, sizes)
            kept, tokens = True, range(places.tokens)
            if step.where is Where.WINDOW:
                assert places.window_tokens is not None
                tokens = tokens[-places.window_tokens :]
            else:
                assert places.resident == places.tokens, "a single place has all tokens"
            seen.update((head, t) for head in range(kv_heads) for t in tokens)
        elif isinstance(step, Answer):
            assert asked is not None
            seen.update((head, t) for head in range(kv_heads) for t in asked)
            asked = None
        else:
            assert isinstance(step, Attend)
            assert step.write == (asked is None)
            heads_left = kv_heads
            for group in range(step.groups):
                heads = range(group * step.heads, min((group + 1) * step.heads, kv_heads))
                assert heads
                heads_left -= len(heads)
                for part in step.parts:
                    tokens = range(0)
                    if isinstance(part, Own):
                        own = True
                    elif isinstance(part, Near):
                        page = places.page or range(0)
                        where = part.where
                        tokens = range(places.resident) if where is Where.RESIDENT else page
                        assert tokens, "an empty place is not attended"
                    elif isinstance(part, Band):
                        assert places.window_tokens is not None
                        assert kept, "a band has the new tokens in it"
                        tokens = range(max(first_new - places.window_tokens + 1, 0), places.tokens)
                        own = True
                    elif fetched is not None:
                        assert (fetched.heads, fetched.groups) == (step.heads, step.groups)
                        tokens = range(fetched.start, fetched.end)
                    else:
                        assert sizes.in_place
                        tokens = range(places.host)
                    seen.update((head, t) for head in heads for t in tokens)
            assert not heads_left
    assert kept
    assert asked is None
    assert places.resident - places.host <= sizes.page_tokens, "a chunk is sent home at once"
    assert places.tokens == first_new + new
    return seen, own


passes = st.lists(
    st.tuples(
        st.sampled_from([Pass.FORWARD, Pass.FORWARD, Pass.APPEND]),
        st.sampled_from([1, 1, 1, 2, 3, 5, 6, 7, 9, 12]),
        st.sampled_from([0.0, 0.3, 1.0]),
        st.sampled_from([0, 0, 0, 1, 2, 9]),  # tokens taken back before it
    ),
    min_size=6,
    max_size=25,
)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    kv_heads=st.integers(1, 5),
    tile_heads=st.integers(1, 5),
    tile_tokens=st.sampled_from([1, 4, 16]),
    capacity=st.sampled_from([0, 1, 7, 20, 1000]),
    kind_of_track=st.sampled_from(["paged"] * 6 + ["in place", "1", "4", "30"]),
    row_tokens=st.sampled_from([1, 4, 9]),
    sequence=passes,
)
def test_every_pass_attends_what_it_may_see_once(
    kv_heads: int,
    tile_heads: int,
    tile_tokens: int,
    capacity: int,
    kind_of_track: str,
    row_tokens: int,
    sequence: list[tuple[Pass, int, float, int]],
) -> None:
    in_place = kind_of_track == "in place"
    window_tokens = int(kind_of_track) if kind_of_track.isdigit() else None
    sizes = Sizes(tile_heads, tile_tokens, SIZES.page_tokens, in_place)
    places = Places(0 if in_place or window_tokens else capacity, window_tokens)
    places.row_tokens = row_tokens
    sequence = [(Pass.FORWARD, 12, 0.0, 0), *sequence]
    for kind, new, share, taken_back in sequence:
        if window_tokens is None:
            crop(places, taken_back)
        past = places.tokens
        steps = route_track(places.held(kv_heads), kind, new, sizes, share)
        assert steps.serves(past)
        seen, own = run(steps.steps, places, kv_heads, new, sizes)
        if kind is Pass.APPEND:
            assert not seen
            continue
        low = 0 if window_tokens is None else max(past - window_tokens + 1, 0)
        wanted = set(range(low, past + new if new == 1 or window_tokens is not None else past))
        assert seen == Counter((head, t) for head in range(kv_heads) for t in wanted)
        assert own == (new > 1)
        if new > MAX_ASKED_TOKENS:
            assert not any(isinstance(step, Ask) for step in steps.steps)


def crop(places: Places, tokens: int) -> None:
    """Take back some of the newest tokens, as a ledger does."""
    places.tokens = max(places.tokens - tokens, 0)
    places.resident = min(places.resident, places.tokens)
    if places.page is not None:
        page = range(places.page.start, min(places.page.stop, places.tokens))
        places.page = page or None
    places.host = min(places.host, places.tokens)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    capacity=st.sampled_from([0, 3, 20]),
    share=st.sampled_from([0.0, 0.4]),
    prompt=st.integers(0, 30),
    row_tokens=st.sampled_from([1, 4, 9]),
    changes=st.lists(
        st.tuples(st.integers(0, 3), st.sampled_from([1, 1, 1, 2, 4])), min_size=5, max_size=40
    ),
)
def test_steps_that_serve_are_those_that_would_be_made(
    capacity: int, share: float, prompt: int, row_tokens: int, changes: list[tuple[int, int]]
) -> None:
    places = Places(capacity, row_tokens=row_tokens)
    if prompt:
        run(route_track(places.held(2), Pass.APPEND, prompt, SIZES).steps, places, 2, prompt, SIZES)
    known: tuple[int, int, TrackSteps] | None = None  # as the executor keeps them: the newest alone
    for taken_back, new in changes:
        if places.tokens - taken_back >= places.host:
            crop(places, taken_back)
        fresh = route_track(places.held(2), Pass.FORWARD, new, SIZES, share)
        if known is not None and known[:2] == (new, places.host) and known[2].serves(places.tokens):
            assert known[2].steps == fresh.steps
        known = new, places.host, fresh
        run(fresh.steps, places, 2, new, SIZES)


def test_pages_of_packed_tokens_are_filled_by_the_first_tail() -> None:
    """What goes home after that fills whole pages: none is packed anew."""
    places = Places(0, tokens=150, host=150, row_tokens=64)
    sizes, sent = Sizes(tile_heads=1, tile_tokens=256, page_tokens=64), []
    for _ in range(200):
        steps = route_track(places.held(2), Pass.FORWARD, 1, sizes).steps
        run(steps, places, 2, 1, sizes)
        sent += [places.host for step in steps if isinstance(step, SendHome)]
    assert sent == [192, 256, 320]


@pytest.mark.parametrize("capacity", [0, 40, 10**7])
def test_steps_serve_until_a_page_is_full(capacity: int) -> None:
    places = Places(capacity, tokens=600, host=600, resident=min(capacity, 600))
    sizes = Sizes(tile_heads=1, tile_tokens=256, page_tokens=64)
    made = 0
    known = None
    for _ in range(640):
        if known is None or not known.serves(places.tokens):
            known, made = route_track(places.held(2), Pass.FORWARD, 1, sizes), made + 1
        run(known.steps, places, 2, 1, sizes)
        if any(isinstance(step, SendHome) for step in known.steps):
            known = None
    assert made == 20  # ten pages: one schedule to fill each, and one to send it home


def test_a_schedule_does_not_grow_with_tokens_or_layers_that_are_alike() -> None:
    held = Held(Track(8), tokens=2**20, host_tokens=2**20)
    sizes = Sizes(tile_heads=1, tile_tokens=256, page_tokens=64)
    schedule = route([held] * 32, Pass.FORWARD, 1, sizes, 0.5)
    (only,) = schedule.runs
    assert only.layers == tuple(range(32))
    assert str(schedule) == (
        "layers 0-31:\n"
        "  keep the new tokens in the page\n"
        "  ask the host about tokens 524288 to 1048576\n"
        "  fetch tokens 0 to 524288 in 16384 tiles of 1 head x 256 tokens\n"
        "  attend by 8 x 1 head: the page, the tiles\n"
        "  merge the host's answer"
    )


def test_layers_that_differ_are_named() -> None:
    full = Held(Track(2), tokens=90, host_tokens=90, resident_tokens=40, resident_capacity=40)
    window = Held(Track(2, window_tokens=24), tokens=90)
    schedule = route([window, full, window, window, full], Pass.FORWARD, 7, SIZES)
    assert str(schedule) == (
        "layers 0, 2-3:\n"
        "  keep the new tokens in the window\n"
        "  attend by 2 heads: the window\n"
        "layers 1, 4:\n"
        "  fetch tokens 40 to 90 in 8 tiles of 1 head x 16 tokens\n"
        "  attend by 2 x 1 head: the new tokens, the residents, the tiles\n"
        "  keep the new tokens in a chunk page\n"
        "  send tokens 90 to 97 home"
    )


@pytest.mark.parametrize("in_place", [False, True])
def test_a_draft_takes_one_step_wherever_tokens_lie(in_place: bool) -> None:
    window = Held(Track(2, window_tokens=24), tokens=90)
    for held in (
        Held(Track(2), tokens=90, host_tokens=84, resident_tokens=40, resident_capacity=40),
        Held(Track(2), tokens=90, host_tokens=84, paged=True),
    ):
        sizes = SIZES._replace(in_place=in_place)
        steps = route_track(held, Pass.DRAFT, 1, sizes, 0.5)
        assert steps.steps == (Decode(Where.DRAFT),)
        assert steps.serves(10**6)
    assert route_track(window, Pass.DRAFT, 1, SIZES).steps == (Decode(Where.WINDOW),)


def test_a_resident_token_takes_one_step() -> None:
    held = Held(Track(2), tokens=9, host_tokens=6, resident_tokens=9, resident_capacity=40)
    assert route_track(held, Pass.FORWARD, 1, SIZES).steps == (Decode(Where.RESIDENT),)


@pytest.mark.parametrize("resident_capacity", [0, 40])
def test_what_several_tokens_fill_goes_home_before_the_next_ones(resident_capacity: int) -> None:
    """Some of them may be taken back, which one token is not."""
    resident = 22 if resident_capacity else 0
    held = Held(Track(2), 22, 20, resident, resident_capacity, paged=not resident)
    several = route_track(held, Pass.FORWARD, 4, SIZES)
    assert not any(isinstance(step, SendHome) for step in several.steps)
    assert several.serves(22)
    full = held._replace(tokens=26, resident_tokens=26 if resident else 0)
    for new_tokens in (1, 4):
        first = route_track(full, Pass.FORWARD, new_tokens, SIZES).steps[0]
        assert first == SendHome(20, 26, turn=not resident)
    one = held._replace(tokens=25, resident_tokens=25 if resident else 0)
    assert route_track(one, Pass.FORWARD, 1, SIZES).steps[-1] == SendHome(20, 26, late=resident > 0)


def test_one_is_singular() -> None:
    fetch = Fetch(start=0, end=9, tile_tokens=16, heads=1, groups=1)
    assert str(fetch) == "fetch tokens 0 to 9 in 1 tile of 1 head x 16 tokens"
    attend = Attend(heads=1, groups=1, parts=(Own(),))
    assert str(attend) == "attend by 1 head: the new tokens"
