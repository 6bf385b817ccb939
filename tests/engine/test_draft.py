"""A pass that attends only what is on the device, while the next pass's tiles are on their way."""

from typing import Any

import pytest

from conversation import Conversation, planned
from headinfer.engine import executor
from headinfer.engine.stats import Stats
from headinfer.schedule.route import Held, Pass, route_track
from headinfer.schedule.steps import TrackSteps

LAYERS, PROMPT_TOKENS, RESIDENT_TOKENS = 3, 70, 20


def talk(seed: int, stats: Stats | None = None, device: str = "simulated") -> Conversation:
    return Conversation(planned(device, LAYERS, RESIDENT_TOKENS, 0.0), seed, stats=stats)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("drafted", [[1, 1, 1], [2, 1], [3]])
def test_drafts_attend_what_is_on_the_device(seed: int, drafted: list[int]) -> None:
    chat = talk(seed)
    chat.step(PROMPT_TOKENS, Pass.FORWARD)
    chat.step(1, Pass.FORWARD)
    near = [*range(RESIDENT_TOKENS), PROMPT_TOKENS]
    for tokens in drafted:
        chat.step(tokens, Pass.DRAFT, near)
        near += range(near[-1] + 1, near[-1] + 1 + tokens)
    chat.crop(sum(drafted))
    chat.step(sum(drafted), Pass.FORWARD)
    chat.step(1, Pass.FORWARD)
    chat.engine.close()


def test_drafts_leave_the_next_passs_tiles_on_their_way() -> None:
    fetched = []
    for drafts in (0, 3):
        stats = Stats()
        chat = talk(0, stats)
        chat.step(PROMPT_TOKENS, Pass.FORWARD)
        chat.step(1, Pass.FORWARD)
        before = stats.bytes_to_device
        near = [*range(RESIDENT_TOKENS), PROMPT_TOKENS]
        for draft in range(drafts):
            chat.step(1, Pass.DRAFT, near)
            near.append(PROMPT_TOKENS + 1 + draft)
        assert stats.bytes_to_device == before, "a draft fetches nothing"
        if drafts:
            chat.crop(drafts)
        chat.step(1, Pass.FORWARD)
        fetched.append(stats.bytes_to_device)
        chat.engine.close()
    assert fetched[0] == fetched[1]


def test_drafts_that_fill_a_page_are_sent_home_like_other_tokens() -> None:
    chat = talk(1)
    chat.step(PROMPT_TOKENS, Pass.FORWARD)
    page = chat.engine.plan.page_tokens
    for _ in range(page + 2):
        tokens = chat.kv[0].shape[2]
        home = (
            (tokens - PROMPT_TOKENS) // chat.engine.plan.page_tokens * chat.engine.plan.page_tokens
        )
        near = [*range(RESIDENT_TOKENS), *range(PROMPT_TOKENS + home, tokens)]
        chat.step(1, Pass.DRAFT, near)
    chat.step(1, Pass.FORWARD)
    chat.engine.close()


def test_steps_are_made_anew_only_where_tokens_move(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    def counted(held: Held, *args: Any) -> TrackSteps:
        made.append(held)
        return route_track(held, *args)

    monkeypatch.setattr(executor, "route_track", counted)
    for device in ("cpu", "simulated"):
        chat = talk(0, device=device)
        chat.step(PROMPT_TOKENS, Pass.FORWARD)
        made.clear()
        for _ in range(3 * chat.engine.plan.page_tokens):
            chat.step(1, Pass.FORWARD)
        # Each page: steps to fill it, and to send it home. In place no token ever moves.
        assert len(made) == LAYERS * (1 if device == "cpu" else 6)
        chat.engine.close()
