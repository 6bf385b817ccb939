"""Times of drafts are those of the answer's own work."""

import threading
import time
from typing import Any

import pytest

import headinfer
from headinfer.generation import candidates
from headinfer.integration.turns import Turns, waited_s
from saved_models import make_tokenizer
from tiny_models import VOCAB, random_tokens, tiny_model

HELD_S = 0.3
"""How long others have their turns: many times what a tiny model computes for."""


def let_another_in(turns: Turns) -> None:
    """Ask for a turn while another thread has a long one, as a server's other clients have."""
    inside = threading.Event()

    def hold() -> None:
        inside.set()
        time.sleep(HELD_S)

    other = threading.Thread(target=turns.run, args=(hold,))
    other.start()
    assert inside.wait(60)
    turns.run(lambda: None)
    other.join()


def test_waits_for_others_are_no_time_of_drafting(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = tiny_model("llama3"), random_tokens(1, 9).repeat(1, 5)[0].tolist()
    draft, drafted = candidates.Lookup.draft, []

    def draft_late(*given: Any) -> list[int]:
        let_another_in(turns)
        drafted.append(draft(*given))
        return drafted[-1]

    monkeypatch.setattr(candidates.Lookup, "draft", draft_late)
    with headinfer.attach(model, device="cpu") as offload:
        turns = offload.new_cache().turns
        settings = {"draft": 3, "prompt_lookup_num_tokens": 3, "max_new_tokens": 4}
        *_, last = headinfer.generate(model, ids, tokenizer=make_tokenizer(VOCAB), **settings)
    assert drafted
    assert last.draft_s < len(drafted) * HELD_S / 2


def test_a_thread_knows_how_long_it_waited_for_turns() -> None:
    turns, inside = Turns(), threading.Event()

    def hold() -> None:
        inside.set()
        time.sleep(HELD_S)

    other = threading.Thread(target=turns.run, args=(hold,))
    other.start()
    assert inside.wait(60)
    before_s = waited_s()
    turns.run(lambda: None)
    assert waited_s() - before_s > HELD_S / 2
    other.join()
    before_s = waited_s()
    turns.run(time.sleep, HELD_S)
    assert waited_s() == before_s, "nobody else had the turn"


def test_a_thread_that_passes_its_turn_on_waited_for_those_that_took_it() -> None:
    turns = Turns()

    def hold() -> None:
        other = threading.Thread(target=turns.run, args=(time.sleep, HELD_S))
        other.start()
        while not turns.awaited():
            time.sleep(0)
        before_s = waited_s()
        turns.pass_on()
        assert waited_s() - before_s > HELD_S / 2
        other.join()

    turns.run(hold)
