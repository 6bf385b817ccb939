"""Times of drafts are those of the answer's own work."""

import threading
import time

import headinfer
from headinfer.integration.turns import Turns, waited_s
from saved_models import make_tokenizer
from tiny_models import VOCAB, random_tokens, tiny_model

HELD_S = 0.04
"""How long others have their turns: many times what a tiny model computes for."""


class Others(threading.Thread):
    """Others who take a long turn whenever they can, as a server's other clients do."""

    def __init__(self, turns: Turns) -> None:
        super().__init__()
        self.ended = threading.Event()
        self.held_s = 0.0
        self._turns = turns

    def run(self) -> None:
        while not self.ended.is_set():
            self._turns.run(self._hold)

    def _hold(self) -> None:
        began_s = time.perf_counter()
        time.sleep(HELD_S)
        self.held_s += time.perf_counter() - began_s


def test_waits_for_others_are_no_time_of_drafting() -> None:
    """With them it would be most of the time that has passed."""
    model, ids = tiny_model("llama3"), random_tokens(1, 140)[0].tolist()
    with headinfer.attach(model, device="cpu", draft_tokens=64) as offload:
        others, began_s = Others(offload.new_cache().turns), time.perf_counter()
        others.start()
        try:
            *_, last = headinfer.generate(
                *(model, ids), tokenizer=make_tokenizer(VOCAB), draft=3, max_new_tokens=8
            )
        finally:
            others.ended.set()
            others.join()
        passed_s = time.perf_counter() - began_s
    assert last.drafted_tokens >= 3
    assert last.prefill_s + last.decode_s + last.capture_s < passed_s - others.held_s / 2


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
