"""`headinfer chat` at a terminal: keys, Ctrl-C and Ctrl-D, history, signals."""

import json
import os
import re
import signal
import sys

import pytest

pytest.importorskip("prompt_toolkit", reason="the extra chat is not installed")
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="it has no pseudo-terminals")

ASKED = "\x1b[?2004h"
"""What a terminal is sent when a line is to be written."""
CTRL_C, CTRL_D, UP = "\x03", "\x04", "\x1b[A"
ALT_ENTER = "\x1b\r"
SHORT = ("--no-do-sample", "-n", 4)
ENDLESS = ("--no-do-sample", "-n", 200_000)


@pytest.mark.slow
def test_a_conversation_from_hello_to_ctrl_d(terminal, chat_llama, conversed, tmp_path):
    screen = terminal("--model", chat_llama, "--no-do-sample", "-n", 6)
    screen.wait_for("Ctrl-D leaves")
    first, second = conversed("w7 w14", "w3")
    screen.say("w7 w14")
    screen.wait_for(first)
    screen.say("/stats")
    screen.wait_for("2 messages")
    screen.say("/nothing")
    screen.wait_for("no command /nothing")
    screen.say("w3")
    screen.wait_for(second)
    screen.wait_for(ASKED)
    screen.type(CTRL_D)
    assert screen.end() == 0
    assert "Traceback" not in screen.shown


@pytest.mark.slow
def test_ctrl_c_stops_the_answer_and_what_was_said_stays(terminal, endless_llama):
    screen = terminal("--model", endless_llama, *ENDLESS)
    screen.say("w9 w3")
    for _ in range(6):
        screen.wait_for(" w")
    screen.type(CTRL_C)
    screen.wait_for("stopping")
    screen.say("/stats")
    screen.wait_for("2 messages")
    screen.say("w3")
    screen.wait_for(" w")
    screen.type(CTRL_C)
    screen.wait_for("stopping")
    screen.say("/stats")
    screen.wait_for("4 messages")
    screen.wait_for("were read")
    told = re.findall(r"([\d,]+) of ([\d,]+) tokens were read", screen.shown)[-1]
    read, of = (int(number.replace(",", "")) for number in told)
    # A special token that text does not show is read again, with what is behind it.
    assert of - read >= 5
    screen.say("/exit")
    assert screen.end() == 0


@pytest.mark.slow
def test_ctrl_c_while_a_file_is_read_keeps_what_was_read(terminal, endless_llama, tmp_path):
    book = tmp_path / "book.txt"
    book.write_text("w1 w2 w3 w4 " * 10_000)
    screen = terminal("--model", endless_llama, *ENDLESS, "--chunk-tokens", 64, "-f", book)
    screen.say("w7")
    screen.wait_for(" left")
    screen.type(CTRL_C)
    screen.wait_for("stopped before an answer")
    screen.say("/stats")
    screen.wait_for("0 messages")
    (held,) = re.findall(r"0 messages, ([\d,]+) tokens in the cache", screen.shown)
    assert 64 <= int(held.replace(",", "")) < 40_000
    screen.wait_for("were read")
    assert re.findall(r"([\d,]+) of [\d,]+ tokens were read", screen.shown) == [held]
    screen.say("w7")  # the file still comes before it
    screen.wait_for(" left")
    screen.type(CTRL_C)
    screen.say("/stats")
    screen.wait_for("the cache had ")
    screen.wait_for("\n")
    assert re.findall(r"the cache had ([\d,]+)", screen.shown) == ["0", held]


def test_keys(terminal, chat_llama, tmp_path):
    (tmp_path / "a-long-name.txt").write_text("w9")
    session = tmp_path / "talk.hsession"
    screen = terminal("--model", chat_llama, *SHORT, "--save-session", session)
    screen.wait_for(ASKED)
    screen.type("/nothing")
    screen.wait_for("nothing")
    screen.type(CTRL_C)  # gives up the line alone
    screen.wait_for("Ctrl-D or /exit leaves")
    screen.wait_for(ASKED)
    screen.type("/sta\t")
    screen.wait_for("ts")
    screen.type("\r")
    screen.wait_for("0 messages")
    screen.wait_for(ASKED)
    screen.type(f"/file {tmp_path}{os.sep}a-lo\t")
    screen.wait_for("ng-name.txt")
    screen.type("\r")
    screen.wait_for("2 characters come before")
    screen.say(f"w7{ALT_ENTER}w14\\\rw21")
    screen.wait_for(ASKED)
    screen.type(CTRL_D)
    assert screen.end() == 0
    assert "no command" not in screen.shown
    said = json.loads((session / "messages.json").read_text())["messages"]
    assert [message["role"] for message in said] == ["user", "assistant"]
    assert said[0]["content"] == "w9\n\nw7\nw14\nw21"


@pytest.mark.slow
def test_a_conversation_that_cannot_be_saved_goes_on(terminal, chat_llama, tmp_path):
    place, elsewhere = tmp_path / "place", tmp_path / "elsewhere"
    place.mkdir()
    screen = terminal("--model", chat_llama, *SHORT, "--save-session", place / "s")
    screen.say("w7")
    screen.wait_for(ASKED)
    place.rmdir()
    screen.type(CTRL_D)
    screen.wait_for("there is no folder")
    screen.wait_for("the conversation goes on: /save FOLDER saves it elsewhere, Ctrl-D leaves")
    screen.say(f"/save {elsewhere}")
    screen.wait_for("tokens saved to")
    screen.wait_for(ASKED)
    screen.type(CTRL_D)
    assert screen.end() == 0
    assert len(json.loads((elsewhere / "messages.json").read_text())["messages"]) == 2


@pytest.mark.slow
def test_inputs_are_kept_between_runs_for_this_user_alone(terminal, chat_llama, tmp_path):
    for keys in ("w7 w14 w21", UP):
        session = tmp_path / f"{len(keys)}.hsession"
        screen = terminal("--model", chat_llama, *SHORT, "--save-session", session)
        screen.say(keys)
        screen.wait_for(ASKED)
        screen.type(CTRL_D)
        assert screen.end() == 0
        said = json.loads((session / "messages.json").read_text())["messages"]
        assert said[0]["content"] == "w7 w14 w21"
    folder = tmp_path / "state" / "headinfer"
    assert folder.stat().st_mode & 0o777 == 0o700
    (history,) = folder.iterdir()
    assert history.name == "chat-history"
    assert history.stat().st_mode & 0o777 == 0o600


@pytest.mark.slow
def test_without_a_place_for_the_history_there_is_a_note(terminal, chat_llama, tmp_path):
    (tmp_path / "state").write_text("no folder")
    screen = terminal("--model", chat_llama, *SHORT)
    screen.wait_for("note: inputs are not kept")
    screen.say("w7")
    screen.say("/exit")
    assert screen.end() == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "code", "busy"),
    [
        ("SIGTERM", 143, True),
        ("SIGHUP", 129, False),
        pytest.param("SIGTERM", 143, False, marks=pytest.mark.slow),
        pytest.param("SIGHUP", 129, True, marks=pytest.mark.slow),
    ],
)
def test_signals_end_it_and_the_session_is_saved(
    terminal, chat_llama, endless_llama, tmp_path, name, code, busy
):
    session = tmp_path / "talk.hsession"
    model, settings = (endless_llama, ENDLESS) if busy else (chat_llama, SHORT)
    screen = terminal("--model", model, *settings, "--save-session", session)
    screen.say("w7 w14")
    screen.wait_for(" w" if busy else ASKED)
    screen.process.send_signal(getattr(signal, name))
    assert screen.end() == code
    assert "Traceback" not in screen.shown
    assert len(json.loads((session / "messages.json").read_text())["messages"]) == 2


@pytest.mark.slow
def test_a_terminal_that_is_closed_ends_it(terminal, chat_llama):
    screen = terminal("--model", chat_llama, *SHORT)
    screen.wait_for(ASKED)
    screen.hang_up()
    assert screen.process.wait(timeout=180) in (0, 129)


def test_a_terminal_needs_the_extra(monkeypatch, capsys):
    from headinfer.cli.console import stderr_console
    from headinfer.cli.talk.lines import open_lines
    from headinfer.errors import OptionError

    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    monkeypatch.setitem(sys.modules, "prompt_toolkit", None)
    with pytest.raises(OptionError, match=r"pip install 'headinfer\[chat\]'"):
        open_lines(stderr_console())
