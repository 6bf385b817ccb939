"""A server that is killed in the middle of a save, and goes on after a restart.

The save is held up at its last step but one, where all its pages are written: whoever opens a pipe
to write waits for a reader.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx2
import pytest
from server_parts import (
    WAIT_S,
    Running,
    act,
    ask,
    cached,
    command,
    environment,
    in_thread,
    running,
    text_of,
    wait_until,
)

from saved_models import save_llama

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform == "win32", reason="it has no SIGKILL"),
]

TEXT = " ".join(f"w{number % 90}" for number in range(0, 3000, 7))
MORE = " ".join(f"w{number % 90}" for number in range(0, 1000, 11))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_llama(
        tmp_path_factory.mktemp("kept"), chat=True, eos_token_id=None, positions=2**16
    )


def generate(folder: Path, *args: object) -> "subprocess.CompletedProcess[str]":
    options = ("--device", "cpu", "--no-do-sample", "-n", 4)
    return subprocess.run(
        command("generate", "--model", folder, *options, *args),
        env=environment(),
        capture_output=True,
        text=True,
        timeout=WAIT_S,
    )


def saving(server: Running, slot_id: str) -> None:
    with contextlib.suppress(httpx2.TransportError):  # as nobody answers
        act(server, "save", slot_id, "book")


def test_a_kill_in_the_middle_of_a_save_leaves_the_session_that_was_there(folder, tmp_path) -> None:
    session = tmp_path / "book"
    options = ("--model", folder, "--session-folder", tmp_path, "--quiet")
    with running(*options) as server:
        first = ask(server, TEXT)
        slot = first["id_slot"]
        said = [{"role": "user", "content": TEXT}, {"role": "assistant", "content": "w1"}]
        assert act(server, "save", slot, "book", messages=said).status_code == 200
        pages = set(session.iterdir())
        os.mkfifo(session / "index.json.new")
        second = ask(server, TEXT, text_of(first), MORE, new_tokens=40)
        in_thread(lambda: saving(server, second["id_slot"]))
        wait_until(lambda: len(set(session.glob("*.safetensors")) - pages) > 0)
        time.sleep(0.5)
        server.process.send_signal(signal.SIGKILL)
        server.process.wait()
    (session / "index.json.new").unlink()
    with running(*options) as server:
        restored = act(server, "restore", 0, "book").json()
        assert restored["n_restored"] == first["usage"]["prompt_tokens"] + 3
        assert restored["messages"] == said
        again = ask(server, TEXT, text_of(first), MORE, new_tokens=40)
        assert text_of(again) == text_of(second)
        assert cached(again) >= first["usage"]["prompt_tokens"] - 1  # its end is rendered anew
        saved = act(server, "save", again["id_slot"], "book")
        assert saved.json()["n_saved"] > restored["n_restored"]
    done = generate(folder, "-p", TEXT, "--session", session)
    assert done.returncode == 0
    assert "need not be read again" in done.stderr


def test_a_kill_while_prefixes_are_saved_at_the_end_leaves_those_before(folder, tmp_path) -> None:
    options = ("--model", folder, "--session-folder", tmp_path, "--quiet")
    text = [6 + number % 80 for number in range(0, 3000, 7)]
    more = [*text, *(6 + number % 80 for number in range(0, 1000, 11))]
    with running(*options) as server:
        complete(server, text, 1)
        assert server.end()[0] == 0
    (prefix,) = tmp_path.glob("*.hsession")
    with running(*options) as server:
        second = complete(server, more, 40)
        assert cached(second) == len(text)
        pages = set(prefix.iterdir())
        os.mkfifo(prefix / "index.json.new")
        server.process.send_signal(signal.SIGTERM)
        wait_until(lambda: len(set(prefix.glob("*.safetensors")) - pages) > 0)
        time.sleep(0.5)
        server.process.send_signal(signal.SIGKILL)
        server.process.wait()
    (prefix / "index.json.new").unlink()
    with running(*options) as server:
        again = complete(server, more, 40)
        assert again["choices"] == second["choices"]
        assert cached(again) == len(text)


def complete(server: Running, ids: list[int], new_tokens: int) -> dict[str, Any]:
    body = {"prompt": ids, "max_tokens": new_tokens, "temperature": 0}
    return server.post("/v1/completions", **body).json()
