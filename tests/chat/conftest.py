"""Conversations: piped to the command line in this process, and typed at a terminal of its own."""

import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from command_line import Outcome, invoked, without_hub
from saved_models import WORDS, save_llama

PROJECT = Path(__file__).resolve().parents[2]
DEADLINE_S = 120

TEMPLATE = (
    "{% for message in messages %}"
    "{{ {'user': '<user>', 'assistant': '<assistant>', 'system': '<s>'}[message['role']] }} "
    "{{ message['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
"""Unlike that of other tests it repeats answers as the model gave them."""


@pytest.fixture(autouse=True)
def _no_hub(monkeypatch):
    without_hub(monkeypatch)


@pytest.fixture
def verb():
    """Run a verb in this process."""
    return invoked


@pytest.fixture
def chat(verb, chat_llama):
    """Pipe lines to a conversation, greedily and with short answers unless options say else."""

    def run(*lines, options=(), model=chat_llama, tokens=6, greedy=True) -> Outcome:
        text = b"".join(
            (line if isinstance(line, bytes) else str(line).encode()) + b"\n" for line in lines
        )
        settings = (*(("--no-do-sample",) if greedy else ()), "-n", tokens, *options)
        return verb("chat", "--model", model, *settings, stdin=text)

    return run


def save_talker(folder: Path, template: str = TEMPLATE, **config) -> Path:
    """Save a tiny Llama with a chat template."""
    save_llama(folder, chat=True, **config)
    (folder / "chat_template.jinja").write_text(template)
    return folder


@pytest.fixture(scope="session")
def chat_llama(tmp_path_factory) -> Path:
    """A folder with a tiny Llama with a chat template."""
    return save_talker(tmp_path_factory.mktemp("chat"))


@pytest.fixture(scope="session")
def endless_llama(tmp_path_factory) -> Path:
    """The same, which never comes to an end."""
    folder = tmp_path_factory.mktemp("endless")
    return save_talker(folder, eos_token_id=None, positions=2**20)


@pytest.fixture(scope="session")
def stock(chat_llama):
    """Answer messages by stock transformers, greedily."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(chat_llama).eval()
    tokenizer = AutoTokenizer.from_pretrained(chat_llama)

    def answer(messages: list[dict[str, str]], tokens: int = 6) -> str:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        inputs = tokenizer(text, add_special_tokens=False, return_tensors="pt")
        ids = model.generate(**inputs, do_sample=False, max_new_tokens=tokens)
        return tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)

    return answer


@pytest.fixture
def conversed(stock):
    """What stock transformers answers to one message after the other."""

    def run(*texts, system=None) -> list[str]:
        messages = [] if system is None else [{"role": "system", "content": system}]
        answers = []
        for text in texts:
            messages.append({"role": "user", "content": text})
            answers.append(stock(messages))
            messages.append({"role": "assistant", "content": answers[-1]})
        return answers

    return run


def words(first: int, count: int) -> str:
    return " ".join(WORDS[number * 7 % 90] for number in range(first, first + count))


class Terminal:
    """`headinfer chat` in a terminal of its own, whose keys we press and whose screen we read."""

    def __init__(self, *args, state: Path) -> None:
        import fcntl
        import pty
        import struct
        import termios

        ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 30, 100, 0, 0))
        environment = os.environ | {
            "PYTHONPATH": str(PROJECT / "src"),
            "HF_HUB_OFFLINE": "1",
            "PROMPT_TOOLKIT_NO_CPR": "1",  # nobody here tells where the cursor is
            "TERM": "xterm",
            "XDG_STATE_HOME": str(state),
        }
        self._keys = ours
        self.process = subprocess.Popen(
            [sys.executable, "-m", "headinfer.cli.main", "chat", *map(str, args)],
            env=environment,
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
            preexec_fn=_take_terminal,
        )
        os.close(theirs)
        self.shown = ""
        self._seen = 0

    def type(self, keys: str) -> None:
        os.write(self._keys, keys.encode())

    def wait_for(self, text: str) -> None:
        """Wait until a text is shown behind what was waited for before."""
        end_s = time.monotonic() + DEADLINE_S
        while (place := self.shown.find(text, self._seen)) < 0:
            last = f"no {text!r} in {self.shown[-2000:]!r}"
            assert self._read(), last
            assert time.monotonic() < end_s, last
        self._seen = place + len(text)

    def say(self, text: str) -> None:
        """Wait to be asked, and write a message."""
        self.wait_for("\x1b[?2004h")  # pastes are to be marked from here on
        self.type(f"{text}\r")
        self.wait_for("\x1b[?2004l")  # until then keys are for the line

    def end(self) -> int:
        """Wait for the end, and return the exit code."""
        while self._read():
            pass
        return self.process.wait(timeout=DEADLINE_S)

    def _read(self) -> bool:
        ready, _, _ = select.select([self._keys], [], [], 1)
        if not ready:
            return self.process.poll() is None
        try:
            data = os.read(self._keys, 65536)
        except OSError:  # the other end was closed
            return False
        self.shown += data.decode(errors="replace")
        return bool(data)

    def hang_up(self) -> None:
        """Close the terminal, as by closing its window."""
        os.close(self._keys)
        self._keys = -1

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        if self._keys >= 0:
            os.close(self._keys)


def _take_terminal() -> None:
    """Make the terminal the one whose Ctrl-C this process hears."""
    import fcntl
    import termios

    for name in ("SIGHUP", "SIGINT", "SIGTERM"):  # which whoever started the tests may ignore
        signal.signal(getattr(signal, name), signal.SIG_DFL)
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


@pytest.fixture
def terminal(tmp_path):
    """Open conversations in terminals; all have the same folder for what outlives a run."""
    opened = []

    def start(*args) -> Terminal:
        opened.append(Terminal(*args, state=tmp_path / "state"))
        return opened[-1]

    yield start
    for each in opened:
        each.close()
