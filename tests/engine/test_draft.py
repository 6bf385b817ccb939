"""Drafts: passes that attend copies of some tokens, and leave everything else as it was."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conversation import Conversation, planned
from headinfer.engine import executor
from headinfer.engine.drafting import draft_obstacle
from headinfer.engine.stats import Stats
from headinfer.errors import CacheStateError
from headinfer.schedule.route import Held, route_track
from headinfer.schedule.steps import TrackSteps

LAYERS, PROMPT_TOKENS, RESIDENT_TOKENS, DRAFT_TOKENS = 3, 70, 20, 17


def talk(
    seed: int,
    stats: Stats | None = None,
    device: str = "simulated",
    *,
    share: float = 0.0,
    window: int = 0,
    resident: int = RESIDENT_TOKENS,
) -> Conversation:
    plan = planned(device, LAYERS, resident, share, window, DRAFT_TOKENS)
    return Conversation(plan, seed, stats=stats)


@pytest.mark.parametrize(
    ("device", "resident"),
    [("cpu", 0), ("simulated", 0), ("simulated", RESIDENT_TOKENS), ("simulated", 68)],
)
def test_drafts_attend_the_oldest_the_newest_and_each_other(device: str, resident: int) -> None:
    chat = talk(resident, device=device, resident=resident, share=0.3)
    chat.step(PROMPT_TOKENS)
    for accepted in (1, 3, 8, 30, 5, 1):  # verified together, also past pages
        chat.draft(2)
        chat.step(accepted)
        chat.draft(6)
        chat.crop((accepted + 1) // 2)
    chat.engine.close()


def test_windows_go_on_in_drafts_and_are_taken_back() -> None:
    chat = talk(2, window=9)
    chat.step(320)
    for _ in range(12):  # windows begin anew several times
        chat.draft(6)
        assert chat.engine.tokens(0) - chat.engine.earliest_crop >= 256, "as many as ever"
        chat.step(5)
    assert chat.engine.earliest_crop
    chat.engine.close()


def test_drafts_leave_the_next_passs_tiles_on_their_way() -> None:
    fetched = []
    for drafts in (0, 3):
        stats = Stats()
        chat = talk(0, stats)
        chat.step(PROMPT_TOKENS)
        chat.step(1)
        chat.draft(0)  # which copies what drafts attend
        before = stats.bytes_to_device
        for _ in range(drafts):
            chat.draft(3)
        assert stats.bytes_to_device == before, "a draft fetches nothing"
        chat.step(1)
        fetched.append(stats.bytes_to_device)
        chat.engine.close()
    assert fetched[0] == fetched[1]


def test_accepted_tokens_take_no_link_and_few_that_a_page_sent_home() -> None:
    stats = Stats()
    chat = talk(0, stats, resident=0)
    chat.step(PROMPT_TOKENS)
    token_bytes = LAYERS * chat.engine._full[0].geometry.num_bytes(1)
    moved = []
    for accepted in (3, 2, 4, 2):  # a page has 6
        before = stats.bytes_to_device
        chat.draft(4)
        moved.append((stats.bytes_to_device - before) // token_bytes)
        chat.step(accepted)
    assert moved[:2] == [DRAFT_TOKENS, 0]
    assert max(moved[2:]) <= 6
    chat.engine.close()


def test_what_was_cropped_is_fetched_again_and_no_more() -> None:
    stats = Stats()
    chat = talk(0, stats, resident=0)
    chat.step(PROMPT_TOKENS)
    chat.draft(1)
    chat.crop(5)
    before = stats.bytes_to_device
    chat.draft(2)
    token_bytes = LAYERS * chat.engine._full[0].geometry.num_bytes(1)
    assert stats.bytes_to_device - before == 5 * token_bytes
    chat.engine.close()


@pytest.mark.parametrize("kept", [None, 0, 2, 30])
def test_a_conversation_that_begins_anew_drafts_from_its_own_tokens(kept: int | None) -> None:
    chat = talk(0, resident=0)
    chat.step(PROMPT_TOKENS)
    chat.draft(2)
    if kept is None:
        chat.engine.clear()
        chat.kv = [kv[:, :, :0] for kv in chat.kv]
    else:
        chat.crop(PROMPT_TOKENS - kept)
    chat.step(60)
    chat.draft(2)
    chat.engine.close()


changes = st.lists(
    st.one_of(
        st.tuples(st.just("draft"), st.integers(0, 6)),
        st.tuples(st.just("draft"), st.integers(1, 32)),
        st.tuples(st.just("step"), st.sampled_from([1, 1, 2, 4, 7, 15, 30])),
        st.tuples(st.just("crop"), st.integers(1, 12)),
        st.tuples(st.sampled_from(["select", "fork", "replan", "give up"]), st.just(0)),
    ),
    min_size=3,
    max_size=12,
)


@settings(max_examples=14, deadline=None, derandomize=True)
@given(
    device=st.sampled_from(["cpu", "simulated", "simulated"]),
    seed=st.integers(0, 99),
    share=st.sampled_from([0.0, 0.4]),
    window=st.sampled_from([0, 0, 9]),
    resident=st.sampled_from([0, RESIDENT_TOKENS, 80]),
    sequence=changes,
)
def test_passes_give_the_same_bits_with_drafts_and_without(
    device: str,
    seed: int,
    share: float,
    window: int,
    resident: int,
    sequence: list[tuple[str, int]],
) -> None:
    outputs: list[list[torch.Tensor]] = []
    for drafts in (False, True):
        chat = talk(seed, device=device, share=share, window=window, resident=resident)
        outputs.append(chat.step(PROMPT_TOKENS))
        for change, tokens in sequence:
            outputs[-1] += apply(chat, change, tokens, drafts=drafts)
        outputs[-1] += chat.step(3)
        chat.engine.close()
    assert all(map(torch.equal, *outputs))


def apply(chat: Conversation, change: str, tokens: int, *, drafts: bool) -> list[torch.Tensor]:
    """Have a conversation go on in some way; return what passes give."""
    engine = chat.engine
    if change == "step":
        return chat.step(tokens)
    if change == "draft":
        if drafts and draft_obstacle([engine]) is None:
            state = chat.generator.get_state()
            chat.draft(tokens)
            chat.generator.set_state(state)
    elif change == "crop":
        chat.crop(tokens)
    elif change == "select":
        for layer in range(len(chat.windows)):
            engine.select(layer, [0])
    elif change == "fork":
        chat.fork()
    elif change == "replan":
        engine.replan(engine.plan)
    elif change == "give up":
        engine.give_up_residents()
    elif change == "begin":
        engine.begin_drafts()
    else:
        engine.clear()
    return []


def test_why_nothing_can_be_drafted() -> None:
    chat = talk(0)
    chat.step(48)
    assert draft_obstacle([chat.engine]) == "it has 48 tokens, and drafts are worth it from 49 on"
    chat.step(1)
    assert draft_obstacle([chat.engine]) is None
    chat.engine.park()
    assert draft_obstacle([chat.engine]) == "it has no GPU memory now"
    plain = Conversation(planned("simulated", LAYERS, 0, 0.0), 0)
    plain.step(90)
    wanted = "its plan has no copies of tokens for drafts to attend"
    assert draft_obstacle([plain.engine]) == wanted


@pytest.mark.parametrize("change", ["crop", "select", "fork", "replan", "begin", "clear"])
def test_nothing_else_is_done_between_drafts(change: str) -> None:
    chat = talk(0)
    chat.step(PROMPT_TOKENS)
    chat.engine.begin_drafts()
    chat.step(1, [*range(4), *range(PROMPT_TOKENS - 13, PROMPT_TOKENS)])
    with pytest.raises(CacheStateError, match="leave drafting"):
        apply(chat, change, 1, drafts=True)
    chat.engine.end_drafts()
    assert chat.engine.lengths() == [PROMPT_TOKENS] * LAYERS
    chat.engine.close()


def test_no_other_request_takes_residents_between_drafts() -> None:
    chat = talk(0)
    chat.step(PROMPT_TOKENS)
    chat.engine.begin_drafts()
    chat.engine.give_up_residents()
    assert chat.engine.plan.resident_tokens == RESIDENT_TOKENS
    chat.engine.end_drafts()
    chat.engine.give_up_residents()
    assert chat.engine.plan.resident_tokens == 0
    chat.engine.close()


def test_closing_between_drafts_is_closing() -> None:
    chat = talk(0)
    chat.step(PROMPT_TOKENS)
    chat.engine.begin_drafts()
    chat.engine.close()
    chat.engine.end_drafts()
    assert chat.engine.closed


def test_steps_are_made_anew_only_where_tokens_move(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    def counted(held: Held, *args: Any) -> TrackSteps:
        made.append(held)
        return route_track(held, *args)

    monkeypatch.setattr(executor, "route_track", counted)
    for device in ("cpu", "simulated"):
        chat = talk(0, device=device)
        chat.step(PROMPT_TOKENS)
        made.clear()
        for _ in range(3 * chat.engine.plan.page_tokens):
            chat.step(1)
        # Each page: steps to fill it, and to send it home. In place no token ever moves. All layers
        # have them from the first one.
        assert len(made) == (1 if device == "cpu" else 6)
        chat.engine.close()
