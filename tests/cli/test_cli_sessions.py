"""`--session` and `--save-session`: what was read outlives the process."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from headinfer.saved import writer
from saved_models import save_llama

SMALL = ("--device", "simulated", "--tile-tokens", 16, "--chunk-tokens", 32)
GREEDY = ("--no-do-sample", "-n", 12)
NO_SIGNALS = pytest.mark.skipif(sys.platform == "win32", reason="its signals end a process")


TOKEN_BYTES = 256
"""Of the keys and values of `llama`, without its id."""


def pages(session: Path) -> list[Path]:
    return sorted(session.glob("*-0*.safetensors"))


def test_a_second_question_reads_only_what_is_new(cli, llama, prompt, tmp_path):
    session = tmp_path / "book.hsession"
    question = f"{prompt} w5 w6 w7"
    plain = cli("generate", "--model", llama, "-p", question, *GREEDY)
    first = cli("generate", "--model", llama, "-p", prompt, *GREEDY, "--save-session", session)
    assert first.code == 0
    assert "tokens saved to" in first.err
    assert re.search(r" at [1-9][\d.]* [kKMG]?B/s$", first.err, re.MULTILINE), "and not 0.0 GB/s"
    common = ("generate", "--model", llama, "-p", question, *GREEDY, "--session", session)
    again = cli(*common, *SMALL)
    assert again.out == plain.out
    (line,) = (line for line in again.error_lines if line.startswith("session "))
    assert f"{session}: " in line
    assert "70 of the prompt's 73 need not be read again" in line
    result = json.loads(cli(*common, "--json").out)
    assert result["text"] + "\n" == plain.out
    assert result["cached_tokens"] == 70
    assert result["stats"]["prefill_tokens"] == 3


def test_a_conversation_goes_on_in_the_same_session(cli, chat_llama, prompt, tmp_path):
    session = tmp_path / "s"
    for number in (20, 40, 70):
        words = " ".join(prompt.split()[:number])
        options = ("--session", session) if session.exists() else ()
        args = ("generate", "--model", chat_llama, "-p", words, *GREEDY)
        done = cli(*args, *options, "--save-session", session)
        assert done.code == 0
        assert done.out == cli(*args).out
    assert len(list(session.iterdir())) == 2  # what was there before is gone


def test_of_another_text_nothing_is_used(cli, llama, prompt, tmp_path):
    session = tmp_path / "s"
    cli("generate", "--model", llama, "-p", prompt, *GREEDY, "--save-session", session)
    other = " ".join(reversed(prompt.split()))
    args = ("generate", "--model", llama, "-p", other, *GREEDY)
    done = cli(*args, "--session", session)
    assert done.out == cli(*args).out
    assert "none of them is used" in done.err


@pytest.mark.parametrize(
    ("differs", "told"),
    [
        ({"num_hidden_layers": 3}, "num_hidden_layers is 2 and here 3"),
        ({"head_dim": 32}, "in its config head_dim is 8 and here 32"),  # --head-dim is no option
    ],
)
def test_another_models_session_is_refused(cli, llama, prompt, tmp_path, differs, told):
    session = tmp_path / "s"
    cli("generate", "--model", llama, "-p", prompt, *GREEDY, "--save-session", session)
    other = save_llama(tmp_path / "other", **differs)
    done = cli("generate", "--model", other, "-p", prompt, "--session", session, "--quiet")
    assert done.code == 2
    (line,) = done.error_lines
    assert "is of another model" in line
    assert told in line


def test_a_damaged_session_costs_only_what_is_behind(cli, llama, prompt, tmp_path):
    session = tmp_path / "s"
    args = ("generate", "--model", llama, "-p", prompt, *GREEDY)
    plain = cli(*args, "--save-session", session)
    (page,) = pages(session)
    content = bytearray(page.read_bytes())
    content[-1] ^= 1
    page.write_bytes(content)
    done = cli(*args, "--session", session)
    assert done.code == 0
    assert done.out == plain.out
    (note,) = (line for line in done.error_lines if line.startswith("note: "))
    assert page.name in note
    assert "the 0 of " in note


def test_a_session_that_cannot_be_saved_costs_no_text(
    cli, llama, prompt, reference, tmp_path, monkeypatch
):
    session = tmp_path / "s"
    args = ("generate", "--model", llama, "-p", prompt, *GREEDY, "--save-session", session)
    assert cli(*args).code == 0
    before = {path.name: path.read_bytes() for path in session.iterdir()}

    def full(*_args, **_keywords):
        raise OSError(28, "No space left on device", str(session))

    monkeypatch.setattr("headinfer.saved.writer._write_file", full)
    done = cli(*args, "--quiet")
    assert done.code == 2
    assert done.out == reference(prompt, do_sample=False, max_new_tokens=12) + "\n"
    (line,) = done.error_lines
    assert "No space left on device" in line
    assert "as it was" in line
    assert {path.name: path.read_bytes() for path in session.iterdir()} == before


def fill_disk(monkeypatch, free_bytes: int) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _path: SimpleNamespace(free=free_bytes))


def test_a_session_without_room_is_refused_before_the_prompt_is_read(
    cli, llama, prompt, tmp_path, monkeypatch
):
    session = tmp_path / "s"
    args = ("generate", "--model", llama, "-p", prompt, *GREEDY, "--save-session", session)
    fill_disk(monkeypatch, 81 * TOKEN_BYTES - 1)
    done = cli(*args, "--quiet")
    assert done.code == 2
    assert done.out == ""
    (line,) = done.error_lines
    assert "the session of 81 tokens needs 20.25 KiB on disk, and 20.25 KiB are free" in line
    assert list(tmp_path.iterdir()) == []
    fill_disk(monkeypatch, 10**6)
    assert cli(*args).code == 0
    fill_disk(monkeypatch, 81 * TOKEN_BYTES - 1)
    again = cli(*args, "--quiet")
    assert again.out == ""
    assert "on disk, beside the one that is there, and" in again.error_lines[0]


def test_a_disk_that_fills_up_takes_the_first_tokens(cli, llama, prompt, tmp_path, monkeypatch):
    session, real = tmp_path / "s", writer._write_file
    args = ("generate", "--model", llama, "-p", prompt, *GREEDY)

    def fills_up(path, data):
        if len(data) > 60 * TOKEN_BYTES:
            fill_disk(filling, 60 * TOKEN_BYTES)
            raise OSError(28, "No space left on device", str(path))
        return real(path, data)

    with monkeypatch.context() as filling:
        filling.setattr("headinfer.saved.writer._write_file", fills_up)
        done = cli(*args, "--save-session", session, "--quiet")
    assert done.code == 2
    plain = cli(*args)
    assert done.out == plain.out
    (line,) = done.error_lines
    assert "No space left on device" in line
    assert "the first 52 of its 81 tokens were saved, and --session goes on from there" in line
    on = cli(*args, "--session", session)
    assert on.out == plain.out
    assert "52 tokens; 52 of the prompt's 70 need not be read again" in on.err


@pytest.mark.parametrize("name", ["/proc/x", "{closed}/s", "{session}"])
def test_a_place_that_cannot_be_written_is_refused_before_a_model_is_loaded(
    cli, llama, prompt, tmp_path, monkeypatch, name
):
    closed, session = tmp_path / "closed", tmp_path / "s"
    for folder in (closed, session):
        folder.mkdir()
    place = name.format(closed=closed, session=session)

    def refuses(self, *_args, **_keywords):
        raise OSError(30, "Read-only file system", str(self))

    monkeypatch.setattr(Path, "mkdir", refuses)  # whoever may do all finds out so
    monkeypatch.setattr(Path, "touch", refuses)
    done = cli("generate", "--model", tmp_path / "none", "-p", prompt, "--save-session", place)
    assert done.code == 2
    (line,) = done.error_lines
    assert f"a session cannot be saved as {place!r}: Read-only file system" in line
    assert line.endswith("choose a place that you can write to")


@pytest.mark.covering(most=1)
@NO_SIGNALS
@pytest.mark.parametrize("reading", [True, False], ids=["prompt", "answer"])
def test_what_was_read_is_saved_when_the_user_stops(
    command, cli, endless_llama, prompt, reading, tmp_path
):
    session, text = tmp_path / "s", tmp_path / "text"
    text.write_text(" ".join([prompt] * (600 if reading else 1)))
    args = ["generate", "--model", endless_llama, "-f", text, "--no-do-sample"]
    options = ["--chunk-tokens", 64, "--save-session", session, "-n", 200000]
    running = subprocess.Popen(
        [*command[0], *map(str, [*args, *options])],
        env=command[1],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    if reading:
        while b"CPU memory for" not in (said := running.stderr.readline()):
            assert said
        time.sleep(0.5)
    else:
        assert os.read(running.stdout.fileno(), 1)
    running.send_signal(signal.SIGINT)
    _, err = running.communicate(timeout=120)
    assert running.returncode == 130
    if reading and b"holds no tokens" in err:
        pytest.skip("stopped before the first chunk")
    assert b"tokens saved to" in err, err
    index = json.loads((session / "index.json").read_text())
    assert (index["tokens"] < 42000) if reading else (index["tokens"] > 70)
    # What comes behind the saved tokens is read anew, so that little is left of a long text.
    text.write_text(" ".join(text.read_text().split(" ")[: index["tokens"] + 50]))
    after = cli(*args, "-n", 3, "--session", session, "--json")
    assert json.loads(after.out)["cached_tokens"] == (index["tokens"] if reading else 69)
