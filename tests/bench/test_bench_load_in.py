"""`headinfer bench` with weights that are quantised as they are loaded."""

import json

import pytest
from bench_parts import FakeLauncher
from typer.testing import CliRunner

from headinfer.bench.trial import attempt
from headinfer.cli import bench
from saved_models import save_llama


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "tiny"
    return str(save_llama(folder, hidden_size=128, intermediate_size=256))


def run(*arguments: str):
    return CliRunner().invoke(bench.app, ["decode", "--context", "150", *arguments])


@pytest.mark.covering(most=1)
@pytest.mark.parametrize("load_in", ["4bit", "8bit"])
def test_methods_are_compared_in_this_form(load_in, model, monkeypatch):
    pytest.importorskip("bitsandbytes", reason="weights are quantised with bitsandbytes")
    monkeypatch.setattr(bench, "make_launcher", lambda: FakeLauncher(attempt))
    asked = ("--model", model, "--methods", "standard,bounded", "--json")
    settings = ("--device", "simulated", "--chunk-tokens", "40", "--new-tokens", "2")
    documents = []
    for more in ((), ("--load-in", load_in)):
        result = run(*asked, *settings, *more)
        assert result.exit_code == 0, result.stderr
        documents.append(json.loads(result.stdout))
    plain, found = documents
    assert f"its own weights in {load_in}" in found["header"]["model"]["description"]
    assert [row["status"] for row in found["rows"]] == ["ok", "ok"]
    for before, row in zip(plain["rows"], found["rows"], strict=True):
        assert row["bound_s"] < before["bound_s"]  # fewer bytes of weights are read


def test_what_cannot_be_quantised_is_told_at_once(model, monkeypatch):
    def refusal(*arguments: str) -> str:
        result = run(*arguments)
        assert result.exit_code == 2
        return " ".join((result.stderr + str(result.exception)).split())

    assert "give --model" in refusal("--load-in", "4bit")
    dummy = ("--model", model, "--dummy-weights")
    assert "neither --dummy-weights nor --gpus" in refusal("--load-in", "4bit", *dummy)
    line = refusal("--model", model, "--load-in", "8bit", "--dtype", "float32")
    assert "take --dtype bfloat16" in line
    monkeypatch.setattr("headinfer.generation.quantised.find_spec", lambda _name: None)
    line = refusal("--model", model, "--load-in", "4bit")
    assert "weights in 4bit need bitsandbytes: pip install bitsandbytes" in line
