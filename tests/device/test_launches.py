"""Who waits while a prompt's kernels are launched, and for how long."""

import threading
import time

import pytest

from headinfer.device import launches as module
from headinfer.device.launches import Launches


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Launches:
    monkeypatch.setattr(module, "_LONGEST_S", 200.0)
    return Launches()


def waiting(launches: Launches) -> threading.Thread:
    """Return a thread that waits for launches and then ends."""
    thread = threading.Thread(target=launches.wait)
    thread.start()
    return thread


def ends(thread: threading.Thread, within_s: float = 60.0) -> bool:
    thread.join(within_s)
    return not thread.is_alive()


def test_others_wait_for_a_pause_or_for_the_end(launches: Launches) -> None:
    assert ends(waiting(launches))
    with launches.under_way():
        first = waiting(launches)
        assert not ends(first, 0.1)
        with launches.paused():
            assert ends(first)
            assert ends(waiting(launches))
        second = waiting(launches)
        assert not ends(second, 0.1)
    assert ends(second)


def test_who_launches_does_not_wait_for_itself(launches: Launches) -> None:
    with launches.under_way():
        began_s = time.monotonic()
        launches.wait()
        assert time.monotonic() - began_s < 60


def test_a_pause_of_a_thread_that_launches_nothing_is_none(launches: Launches) -> None:
    paused, done = threading.Event(), threading.Event()

    def pause() -> None:
        with launches.paused():
            paused.set()
            done.wait()

    with launches.under_way():
        other = threading.Thread(target=pause)
        other.start()
        assert paused.wait(60)
        assert not ends(waiting(launches), 0.1)
        done.set()
        assert ends(other)
    with launches.paused():
        assert ends(waiting(launches))


def test_a_turn_of_another_thread_ends_no_launches(launches: Launches) -> None:
    def turn() -> None:
        with launches.under_way():
            pass

    with launches.under_way():
        with launches.paused():
            other = threading.Thread(target=turn)
            other.start()
            assert ends(other)
        third = waiting(launches)
        assert not ends(third, 0.1)
        with launches.paused():
            assert ends(third)


def test_nobody_waits_long(launches: Launches, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_LONGEST_S", 0.2)
    with launches.under_way():
        assert ends(waiting(launches))
    monkeypatch.setattr(module, "_LONGEST_S", 60.0)
    with pytest.raises(RuntimeError, match="failed"), launches.under_way():
        raise RuntimeError("failed")
    began_s = time.monotonic()
    launches.wait()
    assert time.monotonic() - began_s < 30


def test_each_of_two_threads_that_launch_has_pauses_of_its_own(launches: Launches) -> None:
    begun, pausing, ending = threading.Event(), threading.Event(), threading.Event()

    def launch() -> None:
        with launches.under_way():
            begun.set()
            assert pausing.wait(60)
            with launches.paused():
                assert ending.wait(60)

    with launches.under_way():
        other = threading.Thread(target=launch)
        other.start()
        assert begun.wait(60)
    third = waiting(launches)
    assert not ends(third, 0.1)  # the other one goes on
    pausing.set()
    assert ends(third)
    ending.set()
    assert ends(other)
    with launches.paused():
        pass
    assert ends(waiting(launches))  # nobody launches
