"""Tiny models with tokenizers, saved as users have them, and ways to run the command line."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from command_line import Outcome, invoked, without_hub
from saved_models import WORDS, save_llama

PROJECT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def _no_hub(monkeypatch):
    without_hub(monkeypatch)


@pytest.fixture
def cli():
    """Run the command line in this process."""
    return invoked


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
            timeout=180,
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
