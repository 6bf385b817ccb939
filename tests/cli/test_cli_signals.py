"""Signals that ask to stop, and a stdout that nobody reads: what was generated is not lost."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from headinfer.cli.interrupt import Interrupt, Stopped, stopping_at_once

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="its signals end a process")

CODES = {"SIGINT": 130, "SIGTERM": 143, "SIGHUP": 129}
WORDS = {"SIGINT": "interrupted", "SIGTERM": "terminated", "SIGHUP": "hung up"}
DEADLINE_S = 120


def often(*values, slow=()):
    """Return parameters of which some are for the slow tests: each starts a process of its own."""
    return [*values, *(pytest.param(value, marks=pytest.mark.slow) for value in slow)]


def has_content(path) -> bool:
    """Whether a file was written; whether it can be is tried before, with an empty one."""
    try:
        return path.stat().st_size > 0
    except FileNotFoundError:
        return False


class Running:
    """`headinfer generate` as a process of its own, with much to do."""

    def __init__(self, command, *args, ignored=()) -> None:
        def ignore() -> None:
            for number in ignored:
                signal.signal(number, signal.SIG_IGN)

        self._process = subprocess.Popen(
            [*command[0], "generate", "--no-do-sample", "-n", "200000", *map(str, args)],
            env=command[1],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            preexec_fn=ignore,
        )
        self.read, self.said = b"", b""

    def wait_for_text(self) -> None:
        chunk = os.read(self._process.stdout.fileno(), 1)
        assert chunk, self._process.communicate()[1]
        self.read += chunk

    def wait_for_plan(self) -> None:
        while b"CPU memory for" not in self.said:
            line = self._process.stderr.readline()
            assert line, self.said
            self.said += line

    def wait_for_file(self, path) -> None:
        end_s = time.monotonic() + DEADLINE_S
        while not has_content(path) and self._process.poll() is None:
            assert time.monotonic() < end_s
            time.sleep(0.02)
        assert self._process.poll() is None, self._process.communicate()

    def send(self, *names: str) -> None:
        for name in names:
            self._process.send_signal(getattr(signal, name))

    def end(self) -> tuple[int, str, str]:
        out, err = self._process.communicate(timeout=DEADLINE_S)
        return self._process.returncode, (self.read + out).decode(), (self.said + err).decode()


@pytest.mark.parametrize("name", often("SIGTERM", slow=("SIGHUP", "SIGINT")))
def test_text_so_far_is_kept(command, endless_llama, prompt, name):
    running = Running(command, "--model", endless_llama, "-p", prompt)
    running.wait_for_text()
    running.send(name)
    code, out, err = running.end()
    assert code == CODES[name]
    assert out.endswith("\n")
    assert out.split()
    assert "decode" in err or "prefill" in err
    assert err.splitlines()[-1] == f"headinfer: {WORDS[name]}"
    assert "Traceback" not in err


@pytest.mark.parametrize(
    "names", often(("SIGHUP", "SIGTERM"), slow=(("SIGTERM",), ("SIGHUP",))), ids="+".join
)
def test_json_is_printed_during_decode(command, endless_llama, prompt, tmp_path, names):
    trace = tmp_path / "trace.json"
    running = Running(command, "--model", endless_llama, "-p", prompt, "--json", "--trace", trace)
    running.wait_for_file(trace)
    running.send(*names)
    code, out, err = running.end()
    assert code in [CODES[name] for name in names]
    result = json.loads(out)
    assert result["finish_reason"] == "interrupted"
    assert result["new_tokens"] > 1
    assert len(result["text"].split()) > 1
    assert result["stats"]["decode_tokens"] > 1
    assert "Traceback" not in err


@pytest.mark.slow
@pytest.mark.parametrize("name", often("SIGHUP", slow=("SIGTERM", "SIGINT")))
def test_json_is_printed_during_prefill(command, endless_llama, tmp_path, name):
    book = tmp_path / "book.txt"
    book.write_text("w1 w2 w3 w4 " * 10_000)
    args = ("--model", endless_llama, "-f", book, "--json", "--chunk-tokens", 16)
    running = Running(command, *args)
    running.wait_for_plan()
    running.send(name)
    code, out, err = running.end()
    assert code == CODES[name], err
    assert json.loads(out)["finish_reason"] == "interrupted"
    assert json.loads(out)["new_tokens"] == 0
    assert "Traceback" not in err


@pytest.mark.parametrize("beams", [1, 2])
def test_the_part_of_a_prompt_that_was_run_is_told(cli, llama, prompt, monkeypatch, beams):
    from headinfer.cli.progress import PrefillBar

    update = PrefillBar.update

    def stop_second(self, done_tokens, all_tokens):
        if done_tokens == 32:
            os.kill(os.getpid(), signal.SIGTERM)
        update(self, done_tokens, all_tokens)

    monkeypatch.setattr(PrefillBar, "update", stop_second)
    args = ("--model", llama, "-p", prompt, "--chunk-tokens", 16, "--num-beams", beams)
    done = cli("generate", *args, "--json")
    assert done.code == 143
    stats = json.loads(done.out)["stats"]
    assert stats["prefill_tokens"] == 32 * beams
    assert stats["prefill_s"] > 0
    assert stats["host_kv_bytes"] >= stats["standard_kv_bytes"] >= 32 * 256 * beams
    assert f"prefill           {32 * beams} tokens" in done.err


@pytest.mark.slow
def test_a_hangup_that_is_ignored_stays_ignored(command, endless_llama, prompt):
    args = ("--model", endless_llama, "-p", prompt)
    running = Running(command, *args, ignored=(signal.SIGHUP,))
    running.wait_for_text()
    running.send("SIGHUP")
    for _ in range(200):
        running.wait_for_text()
    running.send("SIGTERM")
    assert running.end()[0] == 143


def test_the_first_signal_asks_and_the_second_stops(capsys):
    from headinfer.cli.console import stderr_console

    before = [signal.getsignal(getattr(signal, name)) for name in CODES]
    interrupt = Interrupt(stderr_console())
    with interrupt.handling():
        os.kill(os.getpid(), signal.SIGHUP)
        assert interrupt.requested
        with pytest.raises(Stopped) as stopped:
            os.kill(os.getpid(), signal.SIGTERM)
        assert stopped.value.number == signal.SIGHUP
        interrupt.finishing = True
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(Stopped):
            os.kill(os.getpid(), signal.SIGINT)
    assert [signal.getsignal(getattr(signal, name)) for name in CODES] == before
    assert capsys.readouterr().err == "stopping\n"


def test_a_terminal_that_is_gone_does_not_break_the_asking(monkeypatch):
    from headinfer.cli.console import stderr_console

    console = stderr_console()

    def fail(*_args, **_kwargs):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(console, "print", fail)
    interrupt = Interrupt(console)
    with interrupt.handling():
        os.kill(os.getpid(), signal.SIGHUP)
    assert interrupt.requested


def test_signals_are_left_alone_outside_the_main_thread():
    import threading

    seen = []

    def enter() -> None:
        with stopping_at_once():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert seen == [signal.SIG_DFL]


AT_ITS_END = """
import atexit, os, signal, sys
from headinfer.cli.main import run

def send():
    for name in ("SIGINT", "SIGHUP", "SIGTERM"):
        os.kill(os.getpid(), getattr(signal, name))

atexit.register(send)  # as torch's end takes time
sys.argv[0] = "headinfer"
run()
"""


@pytest.mark.covering(most=2)
@pytest.mark.parametrize(
    ("args", "code"),
    [(("plan",), 0), (("plan", "--model", "no-such-preset"), 2), (("--version",), 0), (("x",), 2)],
    ids=["done", "refused", "version", "no verb"],
)
def test_signals_after_a_verb_leave_its_exit_code(command, args, code):
    done = subprocess.run(
        [sys.executable, "-c", AT_ITS_END, *args],
        env=command[1],
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
    )
    assert done.returncode == code, done.stderr
    assert len(done.stderr.splitlines()) == (1 if code else 0)


AMID_IMPORTS = """
import os, signal, sys
from headinfer.cli.entry import run

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "headinfer.cli.main":
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Finder())
run()
"""


def test_ctrl_c_amid_the_imports_is_no_traceback(command):
    done = subprocess.run(
        [sys.executable, "-c", AMID_IMPORTS, "plan"],
        env=command[1],
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
    )
    assert (done.returncode, done.stdout) == (130, "")
    assert done.stderr == "headinfer: interrupted\n"


def test_verbs_that_are_called_in_a_process_leave_its_signals(cli):
    before = [signal.getsignal(getattr(signal, name)) for name in CODES]
    assert cli("plan").code == 0
    assert [signal.getsignal(getattr(signal, name)) for name in CODES] == before


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_probing_ends_with_a_line(cli, monkeypatch, name):
    def stop(*_args, **_kwargs):
        os.kill(os.getpid(), getattr(signal, name))

    monkeypatch.setattr("headinfer.probe.run.run_probe", stop)
    done = cli("probe")
    assert (done.code, done.out) == (CODES[name], "")
    assert done.err == f"headinfer: {WORDS[name]}\n"


def test_the_demo_tells_what_was_measured(cli, monkeypatch):
    from headinfer.cli import demo

    ask = demo._Reader.ask

    def stop_third(self, number, fact):
        if number == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        ask(self, number, fact)

    monkeypatch.setattr(demo._Reader, "ask", stop_third)
    done = cli("demo", "--tokens", "1K", "--device", "cpu")
    assert done.code == 143
    assert done.out.count("  right") == 2
    assert "prefill" in done.out
    assert done.err.splitlines()[-1] == "headinfer: terminated"


def run_without_reader(command, *args) -> subprocess.CompletedProcess:
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "wb") as stdout:
        return subprocess.run(
            [*command[0], "generate", "--no-do-sample", "-n", "50", *map(str, args)],
            env=command[1],
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=subprocess.PIPE,
            text=True,
            timeout=DEADLINE_S,
        )


@pytest.mark.slow
@pytest.mark.parametrize("flags", often(("--json",), slow=((),)), ids=["json", "text"])
def test_without_a_reader_the_statistics_are_still_told(command, llama, prompt, flags):
    done = run_without_reader(command, "--model", llama, "-p", prompt, *flags)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "BrokenPipe" not in done.stderr
    assert "prefill" in done.stderr
    told = "headinfer: error: stdout did not take the JSON: Broken pipe" in done.stderr
    assert told == bool(flags)


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no full device")
def test_a_full_disk_is_one_line(command, llama, prompt):
    with open("/dev/full", "wb") as stdout:
        done = subprocess.run(
            [*command[0], "generate", "--model", str(llama), "-p", prompt, "-n", "5"],
            env=command[1],
            stdout=stdout,
            stderr=subprocess.PIPE,
            text=True,
            timeout=DEADLINE_S,
        )
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last == "headinfer: error: stdout did not take all of the text: No space left on device"
