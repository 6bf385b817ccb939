"""The examples of documents run as they are, on a tiny model."""

import contextlib
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import headinfer
from saved_models import make_tokenizer
from tiny_models import VOCAB, random_tokens, tiny_model

DOCS = Path(__file__).parents[1] / "docs"


@pytest.mark.parametrize(
    ("name", "attached"), [("drafts", False), ("prefixes", False), ("sessions", True)]
)
def test_an_example_runs(name: str, attached: bool, tmp_path, monkeypatch, capsys) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", (DOCS / f"{name}.md").read_text(), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    model, tokenizer = tiny_model("llama3"), make_tokenizer(VOCAB)
    inputs = {"input_ids": random_tokens(1, 20)}
    values: dict[str, Any] = {"torch": torch, "headinfer": headinfer, "model": model}
    values |= {"tokenizer": tokenizer, "prompt": "w1 w2", "inputs": inputs, "ids": [5, 6, 7]}
    with headinfer.attach(model) if attached else contextlib.nullcontext() as offload:
        exec(example, values | {"offload": offload})
    assert capsys.readouterr().out or any(tmp_path.iterdir())
