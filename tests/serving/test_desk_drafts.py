"""Requests whose model drafts, and others that want what they hold."""

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from desk_helpers import PATIENCE_S, Heard, answer, ask, desk_of, tokens

from headinfer.generation import candidates, drafts
from headinfer.generation import drafting as loop
from headinfer.generation.pace import FixedPace
from tiny_models import shared_model

DRAFTING: dict[str, Any] = {"draft_tokens": 32}
GREEDY: dict[str, Any] = {"do_sample": False, "repetition_penalty": 1.0}


class Drafting:
    """A request that drafts, and pauses at a draft until somebody has asked for what it holds."""

    def __init__(self) -> None:
        self.at_a_draft = threading.Event()
        self.go_on = threading.Event()
        self._last_logits = candidates.last_logits

    def __call__(self, *args: Any) -> Any:
        logits = self._last_logits(*args)
        if not self.at_a_draft.is_set():
            self.at_a_draft.set()
            assert self.go_on.wait(PATIENCE_S)
        return logits


class AlwaysThree:
    """Paces that draft three tokens."""

    def begin(self, *_answer: object) -> FixedPace:
        return FixedPace(3)


@pytest.fixture
def drafting(monkeypatch: pytest.MonkeyPatch) -> Iterator[Drafting]:
    paused = Drafting()
    monkeypatch.setattr(drafts, "paces_of", lambda _session: AlwaysThree())
    monkeypatch.setattr(candidates, "last_logits", paused)
    yield paused
    paused.go_on.set()


def soon(paused: Drafting) -> threading.Thread:
    """Have a request go on a moment after the caller has asked for what it holds."""

    def go_on() -> None:
        time.sleep(0.2)
        paused.go_on.set()

    thread = threading.Thread(target=go_on)
    thread.start()
    return thread


def test_a_slot_that_drafts_is_saved_with_what_is_certain(
    drafting: Drafting, tmp_path: Path
) -> None:
    ids = tokens(100)
    with desk_of("llama3", options=DRAFTING, session_folder=tmp_path) as desk:
        heard = Heard()
        ticket = desk.submit(ask(ids, 12), heard)
        assert drafting.at_a_draft.wait(PATIENCE_S)
        going_on = soon(drafting)
        saved = desk.save_slot(ticket.id, "mine")
        ended = ticket.wait(PATIENCE_S)
        going_on.join()
        assert ended is not None
        assert ended.usage.drafted_tokens > 0
        assert len(ids) <= saved.tokens < len(ids) + ended.usage.completion_tokens
        restored = desk.restore_slot("mine")
        assert restored.tokens == saved.tokens
        again = answer(desk, ask(ids, 12))
        assert again.text == heard.text
        assert again.ended.usage.cached_tokens > 90


def test_drafts_that_are_rejected_are_not_saved(
    drafting: Drafting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drafting.at_a_draft.set()  # and pause where drafts were verified, and are still held
    verified, right = threading.Event(), []
    forget = loop.Drafting._forget

    def pause(own: Any, rejected: int) -> None:
        if rejected and not verified.is_set():
            right.append(own._cache.get_seq_length() - rejected)
            verified.set()
            assert drafting.go_on.wait(PATIENCE_S)
        forget(own, rejected)

    monkeypatch.setattr(loop.Drafting, "_forget", pause)
    with desk_of("llama3", options=DRAFTING, session_folder=tmp_path) as desk:
        ticket = desk.submit(ask(tokens(100), 12), Heard())
        assert verified.wait(PATIENCE_S)
        saved = desk.save_slot(ticket.id, "mine")
        drafting.go_on.set()
        ticket.wait(PATIENCE_S)
    assert [saved.tokens] == right


def test_a_prompt_begins_as_one_that_drafts(
    drafting: Drafting, caplog: pytest.LogCaptureFixture
) -> None:
    ids = tokens(100)
    with desk_of("llama3", options=DRAFTING) as desk:
        ticket = desk.submit(ask(ids, 12), Heard())
        assert drafting.at_a_draft.wait(PATIENCE_S)
        going_on = soon(drafting)
        other = answer(desk, ask((*ids[:80], *tokens(9, seed=3)), 4))
        ticket.wait(PATIENCE_S)
        going_on.join()
    assert other.ended.usage.cached_tokens == 80
    assert "a prefix is not used" not in caplog.text


def test_a_request_begins_at_the_pace_of_the_one_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where drafts are cheap and mostly right, by a clock that stands still between passes."""
    now_s, in_a_draft, passes = [0.0], [False], []
    monkeypatch.setattr(time, "perf_counter", lambda: now_s[0])
    last_logits = candidates.last_logits

    def draft(*given: Any) -> Any:
        in_a_draft[0] = True
        try:
            return last_logits(*given)
        finally:
            in_a_draft[0] = False

    def note(_layer: Any, given: tuple[torch.Tensor], _output: Any) -> None:
        now_s[0] += 0.001 if in_a_draft[0] else 0.01
        if not in_a_draft[0]:
            passes.append(given[0].shape[1])

    monkeypatch.setattr(candidates, "last_logits", draft)
    layer = shared_model("llama3").get_input_embeddings()
    hook = layer.register_forward_hook(note)
    try:
        with desk_of("llama3", options={"draft_tokens": 64}) as desk:
            first, second = tokens(9, seed=1) * 40, tokens(9, seed=1) * 41
            assert answer(desk, ask(first, 60, given=GREEDY)).ended.usage.drafted_tokens > 0
            passes.clear()
            usage = answer(desk, ask(second, 60, given=GREEDY)).ended.usage
    finally:
        hook.remove()
    assert usage.cached_tokens == len(first), "so that one pass takes the rest of the prompt"
    assert min(passes[1:6]) > 1, "no step without drafts is timed first"
