"""Turns are fair, and handed on whatever happens."""

import contextlib
import signal
import sys
import threading
import time
from types import FrameType

import pytest

from headinfer.integration import turns as turns_module
from headinfer.integration.turns import Turns


def test_turns_are_given_in_the_order_of_asking() -> None:
    turns, order = Turns(), []
    inside, go_on = threading.Event(), threading.Event()

    def hold() -> None:
        inside.set()
        assert go_on.wait(60)

    threads = [threading.Thread(target=turns.run, args=(hold,), daemon=True)]
    threads[0].start()
    assert inside.wait(60)
    for number in range(5):
        threads.append(threading.Thread(target=turns.run, args=(order.append, number), daemon=True))
        threads[-1].start()
        while len(turns._waiting) <= number:
            pass
    go_on.set()
    for thread in threads:
        thread.join(60)
    assert order == list(range(5))


def test_a_turn_is_passed_on_to_all_that_wait_and_comes_back() -> None:
    turns, order = Turns(), []

    def hold() -> None:
        threads = []
        for number in range(3):
            threads.append(threading.Thread(target=turns.run, args=(order.append, number)))
            threads[-1].start()
            while len(turns._waiting) <= number:
                pass
        turns.pass_on()
        assert turns.mine
        order.append("mine")
        turns.pass_on()  # nobody waits
        for thread in threads:
            thread.join(60)

    turns.run(hold)
    assert order == [0, 1, 2, "mine"]
    assert not turns.mine


def test_a_pause_lets_one_in_that_asks_meanwhile() -> None:
    turns, asked = Turns(), threading.Event()

    def ask() -> None:
        asked.wait(60)
        turns.run(lambda: None)

    thread = threading.Thread(target=ask)
    thread.start()

    def hold() -> None:
        asked.set()
        while thread.is_alive():
            turns.pass_on(0.01)
        assert turns.mine

    turns.run(hold)


def test_passing_on_is_undone_wherever_an_interrupt_comes() -> None:
    for place in range(1, 60):
        turns, others = Turns(), list[threading.Thread]()

        def hold(turns=turns, others=others, place=place) -> None:  # type: ignore[no-untyped-def]
            for _ in range(2):
                others.append(threading.Thread(target=turns.run, args=(lambda: None,), daemon=True))
                others[-1].start()
                while len(turns._waiting) < len(others):
                    pass
            sys.setprofile(Interrupting(place))
            try:
                turns.pass_on()
            finally:
                sys.setprofile(None)
                assert turns.mine

        with contextlib.suppress(KeyboardInterrupt):
            turns.run(hold)
            time.sleep(0.1)  # an interrupt that was put off
        for thread in others:
            thread.join(60)
            assert not thread.is_alive(), f"lost at place {place}"
        assert not turns.mine


class Interrupting:
    """A profiler that interrupts at a place where Python looks for signals, told by its number.

    These are where a function of Python is entered, and where one written in C has returned.
    """

    def __init__(self, place: int) -> None:
        self.place = place
        self.places = 0

    def __call__(self, frame: FrameType, event: str, _argument: object) -> None:
        if frame.f_code.co_filename == turns_module.__file__ and event in ("call", "c_return"):
            self.places += 1
            if self.places == self.place:
                raise KeyboardInterrupt

    def run(self, turns: Turns) -> None:
        sys.setprofile(self)
        try:
            turns.run(lambda: None)
        finally:
            sys.setprofile(None)


def test_a_turn_is_handed_on_wherever_an_interrupt_comes() -> None:
    counting = Interrupting(0)
    counting.run(Turns())
    assert counting.places >= 8
    for place in range(1, counting.places + 1):
        turns = Turns()
        with contextlib.suppress(KeyboardInterrupt):
            Interrupting(place).run(turns)
        assert not turns.mine, f"the turn was lost at place {place} of {counting.places}"
        after = threading.Thread(target=turns.run, args=(lambda: None,), daemon=True)
        after.start()
        after.join(60)
        assert not after.is_alive()


def test_a_turn_is_handed_to_the_next_wherever_an_interrupt_comes() -> None:
    for place in range(1, 40):
        turns = Turns()
        others: list[threading.Thread] = []

        def leave(turns=turns, others=others, place=place) -> None:  # type: ignore[no-untyped-def]
            for _ in range(2):
                others.append(threading.Thread(target=turns.run, args=(lambda: None,), daemon=True))
                others[-1].start()
                while len(turns._waiting) < len(others):
                    pass
            sys.setprofile(Interrupting(place))

        try:
            turns.run(leave)
        except KeyboardInterrupt:
            pass
        finally:
            sys.setprofile(None)
        for thread in others:
            thread.join(60)
            assert not thread.is_alive(), f"lost at place {place}"


@pytest.mark.skipif(sys.platform == "win32", reason="no signals to threads")
def test_waiting_for_a_turn_can_be_interrupted() -> None:
    turns = Turns()
    inside, go_on = threading.Event(), threading.Event()

    def hold() -> None:
        inside.set()
        assert go_on.wait(60)

    holder = threading.Thread(target=turns.run, args=(hold,), daemon=True)
    holder.start()
    assert inside.wait(60)

    def interrupt() -> None:
        while not turns._waiting:
            time.sleep(0.01)
        time.sleep(0.2)  # a signal just before a thread blocks is looked at when it goes on
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(KeyboardInterrupt):
        turns.run(lambda: None)
    assert not turns._waiting
    go_on.set()
    holder.join(60)
    turns.run(lambda: None)
