"""The progress bar and Ctrl-C's two stages."""

import io
import os
import signal

import pytest
from rich.console import Console

from headinfer.cli.interrupt import Interrupt
from headinfer.cli.progress import PrefillBar, format_duration, seconds_left


@pytest.mark.parametrize(("linear", "square"), [(3.0, 0.0), (0.0, 5.0), (2.0, 40.0)])
def test_time_left_is_exact_where_the_law_holds(linear, square):
    total = 2**17

    def elapsed(tokens: int) -> float:
        return linear * tokens / total + square * (tokens / total) ** 2

    points = [(tokens, elapsed(tokens)) for tokens in range(4096, total // 4, 4096)]
    expected = elapsed(total) - points[-1][1]
    assert seconds_left(points, total) == pytest.approx(expected, rel=1e-6)


def test_time_left_is_never_negative():
    assert seconds_left([], 10) is None
    assert seconds_left([(4, 8.0)], 10) == pytest.approx(12.0)
    assert seconds_left([(4, 8.0), (8, 9.0)], 10) > 0
    assert seconds_left([(4, 0.1), (8, 9.0)], 10) > 0
    assert seconds_left([(10, 8.0)], 10) == 0


def test_durations():
    assert [format_duration(s) for s in (0.4, 65, 3725)] == ["0:00", "1:05", "1:02:05"]


def terminal() -> Console:
    return Console(file=io.StringIO(), force_terminal=True, width=100)


def test_the_bar_shows_speed_and_time_left():
    console, times = terminal(), iter([0.0, 0.0, 2.0, 8.0])
    checks = []
    bar = PrefillBar(console, 4096, lambda: checks.append(1), clock=lambda: next(times))
    with bar:
        bar.update(1024, 4096)
        bar.update(30, 30)  # a question's own prefill
        bar.update(4096, 4096)
    shown = console.file.getvalue()
    assert "512 tokens/s" in shown
    assert "0:08" in shown
    assert "4,096 of 4,096 tokens" in shown
    assert len(checks) == 1


def test_no_bar_where_there_is_no_terminal():
    console = Console(file=io.StringIO(), width=100)
    with PrefillBar(console, 100, lambda: None) as bar:
        bar.update(50, 100)
    assert console.file.getvalue().strip() == ""


def test_first_ctrl_c_asks_and_second_stops():
    console = terminal()
    interrupt = Interrupt(console)
    before = signal.getsignal(signal.SIGINT)
    with interrupt.handling():
        interrupt.check()
        os.kill(os.getpid(), signal.SIGINT)
        assert interrupt.requested
        with pytest.raises(KeyboardInterrupt):
            interrupt.check()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before
    assert "stopping" in console.file.getvalue()
