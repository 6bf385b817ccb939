"""The process of a server: how it begins, what it writes, and how it ends."""

import shutil
import signal
import socket
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
from server_parts import WAIT_S, Running, command, environment, events, running, wait_until

from saved_models import save_llama

SECRET = " ".join(f"w{number}" for number in range(33, 66))


def run(*args: object, **more: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        command("serve", *args),
        env=environment(**more),
        capture_output=True,
        text=True,
        timeout=WAIT_S,
    )


@pytest.fixture
def cli_in_process(monkeypatch, capsys):
    """Run the command line in this process."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def run(*args: str) -> SimpleNamespace:
        from headinfer.cli import main

        with pytest.raises(SystemExit) as ended:
            main.app(args, prog_name="headinfer")
        printed = capsys.readouterr()
        return SimpleNamespace(code=ended.value.code, out=printed.out, err=printed.err)

    return run


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_llama(
        tmp_path_factory.mktemp("served"), chat=True, eos_token_id=None, positions=2**20
    )


def test_sigterm_ends_the_streams_and_then_the_process(folder, tmp_path) -> None:
    kept = tmp_path / "sessions"
    with running("--model", folder, "--verbose", "--session-folder", kept) as server:
        text = {"prompt": SECRET, "max_tokens": 200_000}
        server.post("/v1/completions", prompt=SECRET, temperature="hot")
        with server.stream("/v1/completions", **text) as response:
            chunks = events(response)
            next(chunk for chunk in chunks if chunk["choices"][0]["text"])
            begun = time.monotonic()
            server.process.send_signal(signal.SIGTERM)
            *_, last = chunks
        _, err = server.process.communicate(timeout=WAIT_S)
    assert time.monotonic() - begun < 30
    assert server.process.returncode == 0, err
    assert last["error"]["code"] == "closing"
    assert "Traceback" not in err
    (farewell,) = [line for line in err.splitlines() if line.startswith("SIGTERM")]
    assert str(kept) in farewell
    assert "/v1/completions" in err  # requests are logged, by their paths
    assert not any(word in err for word in SECRET.split())
    assert any(kept.iterdir())  # what was read is on the disk


HASTY = """
import sys
from headinfer.server import run
run.CLOSING_S = 0.5
from headinfer.cli import main
main.app(sys.argv[1:])
"""


@pytest.mark.slow
def test_a_chunk_that_does_not_end_does_not_abort_the_process(folder) -> None:
    # The model computes while the interpreter ends, which aborts a process that waits for nothing.
    options = ("--port", 0, "--model", folder, "--device", "cpu", "--chunk-tokens", "256K")
    process = subprocess.Popen(
        [sys.executable, "-c", HASTY, "serve", *map(str, options)],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with process:
        assert process.stdout is not None
        server = Running(process, process.stdout.readline().strip())
        server.wait_ready()
        text = {"prompt": [7] * 200_000, "max_tokens": 1, "return_progress": True}
        with server.stream("/v1/completions", **text) as response:
            next(events(response))
            code, err = server.end()
    assert code == 0, err
    assert "requests that still run: 1" in err
    assert "terminate" not in err


WAITING = """
import sys
from headinfer.serving.desk import Desk
close = Desk.close
def close_once_told(desk, **limits):
    sys.stdin.readline()
    return close(desk, **limits)
Desk.close = close_once_told
from headinfer.cli import main
main.app(sys.argv[1:])
"""


@pytest.fixture
def waiting(folder):
    """A server that goes on stopping until it reads a line."""
    options = ("--port", 0, "--model", folder, "--device", "cpu")
    process = subprocess.Popen(
        [sys.executable, "-c", WAITING, "serve", *map(str, options)],
        env=environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with process:
        try:
            assert process.stdout is not None
            server = Running(process, process.stdout.readline().strip())
            server.wait_ready()
            yield server
        finally:
            process.kill()


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)]
)
def test_a_server_that_stops_says_so_to_who_asks(waiting, number: signal.Signals) -> None:
    asked = {
        "/v1/completions": {"prompt": "w1"},
        "/v1/chat/completions": {"messages": [{"role": "user", "content": "w1"}], "stream": True},
        "/v1/responses": {"input": "w1"},
        "/slots/0?action=restore": {"filename": "book"},
    }
    with waiting.stream("/v1/completions", prompt="w1", max_tokens=200_000) as response:
        chunks = events(response)
        next(chunk for chunk in chunks if chunk["choices"][0]["text"])
        waiting.process.send_signal(number)
        wait_until(lambda: waiting.get("/health").status_code == 503)
        assert waiting.get("/health").json() == {"status": "closing"}
        answers = [waiting.post(path, **body) for path, body in asked.items()]
        answers += [waiting.get(path) for path in ("/v1/models", "/slots", "/sessions")]
        for answer in answers:
            assert answer.status_code == 503
            assert answer.headers["Retry-After"] == "5"
            assert answer.json()["error"] == {
                "message": "the server is stopping; ask again later",
                "type": "server_error",
                "param": None,
                "code": "closing",
            }
        _, err = waiting.process.communicate("end\n", timeout=WAIT_S)
        *_, last = chunks
    assert last["error"]["code"] == "closing"
    assert waiting.process.returncode == 0, err
    assert "Traceback" not in err


def test_a_second_signal_ends_the_process_at_once(waiting) -> None:
    waiting.process.send_signal(signal.SIGTERM)
    wait_until(lambda: waiting.get("/health").status_code == 503)
    waiting.process.send_signal(signal.SIGINT)
    assert waiting.process.wait(timeout=WAIT_S / 4) == 128 + signal.SIGINT


@pytest.mark.slow
def test_ctrl_c_ends_a_server_that_does_nothing(folder) -> None:
    with running("--model", folder, "--quiet") as server:
        code, err = server.end(signal.SIGINT)
    assert (code, err) == (0, "")


@pytest.mark.slow
def test_sigterm_while_the_model_loads_ends_the_process(folder) -> None:
    with running("--model", folder, ready=False) as server:
        begun = time.monotonic()
        code, err = server.end()
    assert time.monotonic() - begun < 30
    assert code == 0, err


def test_an_address_that_is_taken_is_told_in_a_line(cli_in_process) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        done = cli_in_process("serve", "--port", str(taken.getsockname()[1]))
    assert (done.code, done.out) == (2, "")
    (line,) = done.err.splitlines()
    assert "--port" in line


def test_a_model_that_cannot_be_loaded_ends_the_server_in_a_line(
    cli_in_process, folder, tmp_path
) -> None:
    broken = shutil.copytree(folder, tmp_path / "broken")
    (broken / "model.safetensors").write_bytes(b"none")
    done = cli_in_process("serve", "--port", "0", "--model", str(broken))
    assert done.code == 2
    assert done.out.startswith("http://127.0.0.1:")
    assert "Traceback" not in done.err


@pytest.mark.parametrize(
    ("name", "told"),
    [("smolm2", "did you mean 'smollm2'?"), ("./nowhere", "neither a folder"), (".", "config")],
)
def test_a_model_that_is_not_there_is_told_before_there_is_an_address(
    cli_in_process, name: str, told: str
) -> None:
    done = cli_in_process("serve", "--port", "0", "--local-files-only", "--model", name)
    assert (done.code, done.out) == (2, "")
    (line,) = done.err.splitlines()
    assert told in line


def test_a_session_folder_is_looked_at_before_the_model_is_loaded(cli_in_process, tmp_path) -> None:
    (tmp_path / "file").write_text("")
    done = cli_in_process("serve", "--port", "0", "--session-folder", str(tmp_path / "file"))
    assert (done.code, done.out) == (2, "")
    (line,) = done.err.splitlines()
    assert "--session-folder" in line


def test_a_session_folder_that_takes_no_file_is_refused(
    cli_in_process, tmp_path, monkeypatch
) -> None:
    def refuses(**_keywords: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("tempfile.TemporaryFile", refuses)  # the system lets root look otherwise
    done = cli_in_process("serve", "--port", "0", "--session-folder", str(tmp_path))
    assert (done.code, done.out) == (2, "")
    assert done.err.endswith("Read-only file system; give a folder that you can write to\n")


def test_a_session_folder_larger_than_the_disk_is_told(
    cli_in_process, tmp_path, monkeypatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _path: SimpleNamespace(free=2**30))
    args = ("--session-folder", str(tmp_path), "--host", "no.such.host.invalid")
    (tmp_path / "book.hsession").mkdir()
    (tmp_path / "book.hsession" / "index.json").write_bytes(bytes(2**20))
    told = cli_in_process("serve", *args, "--session-folder-size", "3GiB").err
    assert "warning: --session-folder-size 3GiB is 2.00 GiB more than the disk has" in told
    fits = cli_in_process("serve", *args, "--session-folder-size", "1025MiB").err
    assert "--session-folder-size" not in fits


def test_what_is_missing_is_told_with_how_to_install_it(cli_in_process, monkeypatch) -> None:
    from headinfer.server import requirements

    known = requirements.find_spec
    monkeypatch.setattr(
        requirements, "find_spec", lambda name: None if name == "fastapi" else known(name)
    )
    done = cli_in_process("serve")
    assert done.code == 2
    assert "fastapi" in done.err
    assert "pip install 'headinfer[serve]'" in done.err
    assert len(done.err.splitlines()) == 1


@pytest.mark.parametrize(
    "args",
    [
        ("--port", "70000"),
        ("--max-body", "much"),
        ("--cache-memory", "much"),
        ("--session-folder-size", "much"),
        ("--session-folder-size", "1GiB"),
        ("--parallel", "0"),
        ("--api-key", ""),
        ("--ping", "0"),
        ("--host", "no.such.host.invalid"),
        ("--model", "llama-3-8b"),
    ],
)
def test_bad_options_are_refused_in_a_line(cli_in_process, args: tuple[str, ...]) -> None:
    done = cli_in_process("serve", *args)
    assert done.code == 2
    assert len([line for line in done.err.splitlines() if "warning" not in line]) == 1
    assert "Traceback" not in done.err


def test_the_help_fits_a_narrow_terminal() -> None:
    done = run("--help", COLUMNS="80")
    assert done.returncode == 0
    assert max(map(len, done.stdout.splitlines())) <= 80
    for option in ("--host", "--api-key", "--session-folder", "--device-memory"):
        assert option in done.stdout
