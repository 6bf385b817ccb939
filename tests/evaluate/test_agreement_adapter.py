"""Models under an adapter, beside stock under the same one."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from headinfer.cli import evaluate
from lora_files import save_lora
from saved_models import WORDS, save_llama


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file: Path = tmp_path_factory.mktemp("texts") / "text.txt"
    file.write_text(" ".join(WORDS))
    return file


def run(*arguments: object) -> Any:
    return CliRunner().invoke(evaluate.app, ["agreement", *map(str, arguments)])


def rows(*arguments: object) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    done = run(*arguments, "--json", "-")
    assert done.exit_code == 0, done.stderr
    document = json.loads(done.stdout)
    return document["header"]["spec"], document["rows"]


def test_a_model_under_an_adapter_agrees_with_stock_under_it(model, text, tmp_path) -> None:
    adapter = save_lora(model, tmp_path / "lora")
    given = (
        "--model",
        model,
        "--file",
        text,
        "--methods",
        "headinfer,streaming-llm",
        "--device",
        "cpu",
    )
    spec, (exact, other) = rows(*given, "--adapter", adapter)
    assert spec["adapter"] == str(adapter)
    assert (exact["status"], exact["differing"]) == ("ok", 0)
    _, (_, without) = rows(*given)
    assert other["kl_mean"] != without["kl_mean"], "it is another model under the adapter"
