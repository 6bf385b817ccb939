"""Tiny models with tokenizers, saved as users have them, and ways to run the command line."""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from saved_models import WORDS, save_llama

PROJECT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Outcome:
    code: int
    out: str
    err: str

    @property
    def error_lines(self) -> list[str]:
        return [line for line in self.err.splitlines() if line.strip()]


@pytest.fixture(autouse=True)
def _no_hub(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    # Read once at import, which another test may have been the cause of.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.delenv("HEADINFER_DEBUG", raising=False)


@pytest.fixture
def cli(monkeypatch):
    """Run the command line in this process."""
    from typer.testing import CliRunner

    from headinfer.cli.main import app

    def run(*args, stdin=None) -> Outcome:
        result = CliRunner().invoke(app, [str(arg) for arg in args], input=stdin)
        if result.exception and not isinstance(result.exception, SystemExit):
            raise result.exception
        return Outcome(result.exit_code, result.stdout, result.stderr)

    return run


@pytest.fixture(scope="session")
def command():
    """Return how to run the command line as a process of its own, and its environment."""
    environment = os.environ | {"PYTHONPATH": str(PROJECT / "src"), "HF_HUB_OFFLINE": "1"}
    return [sys.executable, "-m", "headinfer.cli.main"], environment


@pytest.fixture
def process(command):
    """Run the command line as a process of its own."""

    def run(*args, stdin=b"", **environment) -> Outcome:
        done = subprocess.run(
            [*command[0], *map(str, args)],
            env=command[1] | environment,
            input=stdin,
            capture_output=True,
            timeout=60,
        )
        return Outcome(done.returncode, done.stdout.decode(), done.stderr.decode())

    return run


@pytest.fixture(scope="session")
def llama(tmp_path_factory) -> Path:
    """A folder with a tiny Llama without chat template, made for 512 positions."""
    return save_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="session")
def chat_llama(tmp_path_factory) -> Path:
    """The same with a chat template."""
    return save_llama(tmp_path_factory.mktemp("chat"), chat=True)


@pytest.fixture(scope="session")
def endless_llama(tmp_path_factory) -> Path:
    """A tiny Llama that never comes to an end."""
    return save_llama(tmp_path_factory.mktemp("endless"), eos_token_id=None, positions=2**20)


@pytest.fixture(scope="session")
def reference(llama):
    """What stock transformers generates greedily for a prompt of words."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(llama).eval()
    tokenizer = AutoTokenizer.from_pretrained(llama)

    def generate(text: str, **settings) -> str:
        inputs = tokenizer(text, return_tensors="pt")
        ids = model.generate(**inputs, **settings)[0, inputs["input_ids"].shape[1] :]
        return tokenizer.decode(ids, skip_special_tokens=True)

    return generate


@pytest.fixture
def prompt() -> str:
    return " ".join(WORDS[number * 7 % 90] for number in range(70))
