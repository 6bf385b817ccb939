"""What stderr shows before the first text."""

import io
import time

from rich.console import Console

from headinfer.cli.stages import Stages

DEADLINE_S = 120


def shown(*, terminal: bool) -> tuple[Console, io.StringIO]:
    text = io.StringIO()
    return Console(file=text, force_terminal=terminal, width=80), text


def wait_for(word: str, text: io.StringIO) -> None:
    end = time.monotonic() + DEADLINE_S
    while word not in text.getvalue():
        assert time.monotonic() < end, f"{word!r} was not said"
        time.sleep(0.01)


def test_a_terminal_shows_each_stage():
    console, text = shown(terminal=True)
    with Stages(console) as stages:
        stages.begin("fetching [it]")
        wait_for("fetching [it]", text)
        stages.begin("tokenising 5 characters")
        wait_for("tokenising 5 characters", text)


def test_a_pipe_has_a_line_for_what_takes_long():
    console, text = shown(terminal=False)
    with Stages(console) as stages:
        stages.begin("loading", quiet_s=1000)
        stages.begin("tokenising", quiet_s=0)
        wait_for("tokenising ...\n", text)
    assert text.getvalue() == "tokenising ...\n"


def test_a_quiet_console_shows_nothing():
    text = io.StringIO()
    with Stages(Console(file=text, force_terminal=True, quiet=True)) as stages:
        stages.begin("loading", quiet_s=0)
    assert text.getvalue() == ""


def test_tokenising_and_the_hub_are_named(cli, llama, monkeypatch):
    begun = []
    monkeypatch.setattr(Stages, "begin", lambda _self, what, **_more: begun.append(what))
    assert cli("generate", "--model", llama, "-p", "w1 w2", "-n", 1).code == 0
    assert [what.split()[0] for what in begun] == ["loading", "tokenising", "loading"]
    assert begun[1] == "tokenising 5 characters"
    begun.clear()
    assert cli("generate", "--model", "nobody/nothing", "-p", "w1").code == 2
    assert begun == ["fetching nobody/nothing from the model hub, or loading it"]
