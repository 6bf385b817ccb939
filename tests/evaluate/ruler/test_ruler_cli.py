"""`headinfer evaluate ruler` as users run it."""

import importlib.util
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from headinfer.cli import evaluate, evaluate_ruler
from saved_models import save_llama

MODEL = ("--model", "demo")


def run(*arguments: str):
    return CliRunner().invoke(evaluate.app, ["ruler", *arguments])


@pytest.mark.slow
def test_answers_are_written_and_gone_on_with(tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    model = str(save_llama(tmp_path / "tiny", positions=2048, eos_token_id=None))
    path = tmp_path / "out.json"
    asked = (
        *("--model", model, "--tasks", "fwe,niah_single_1", "--contexts", "400"),
        *("--methods", "standard,headinfer", "--dtype", "float32", "--threads", "1"),
        *("--json", str(path), "--resume"),
    )
    result = run(*asked, "--samples", "1")
    assert result.exit_code == 0, result.stderr
    assert result.stdout == ""
    first = json.loads(path.read_text())
    assert first["header"]["command"] == "ruler"
    names = ["ruler_fwe/0", "niah_single_1/0"]
    for row in first["rows"]:
        assert row["status"] == "ok"
        assert [record["question"] for record in row["records"]] == names
        assert [len(record["answer"]["tokens"]) for record in row["records"]] == [50, 128]
    stock, ours = (
        [record["answer"]["tokens"] for record in row["records"]] for row in first["rows"]
    )
    assert stock == ours

    result = run(*asked, "--samples", "2")
    assert result.exit_code == 0, result.stderr
    second = json.loads(path.read_text())
    for before, after in zip(first["rows"], second["rows"], strict=True):
        assert after["records"][:2] == before["records"]
        later = [record["question"] for record in after["records"][2:]]
        assert later == ["ruler_fwe/1", "niah_single_1/1"]


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("--tasks", "niah"), "RULER has no task 'niah'; choose among niah_single_1"),
        (("--tasks", "vt,vt"), "named once each"),
        (("--tasks", "all"), "niah_single_2 needs PaulGrahamEssays.json"),
        (("--tasks", "qa_squad", "--data", "nowhere"), "dev-v2.0.json, which is not in 'nowhere'"),
        (("--resume",), "--resume goes on with what --json FILE holds"),
    ],
)
def test_what_cannot_be_asked_is_one_line(
    arguments: tuple[str, ...], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluate_ruler, "find_spec", lambda _: importlib.util.find_spec("json"))
    result = run(*MODEL, *arguments)
    assert result.exit_code == 2
    assert reason in " ".join(result.stderr.split())


def test_a_missing_harness_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluate_ruler, "find_spec", lambda name: None if name != "nltk" else name)
    result = run(*MODEL)
    assert result.exit_code == 2
    said = " ".join(result.stderr.split())
    assert "RULER needs lm_eval, scipy, wonderwords, not installed; pip install" in said
