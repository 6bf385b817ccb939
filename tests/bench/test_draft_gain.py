"""The script that times drafts of a real model end to end."""

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

import headinfer
from saved_models import save_llama

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "draft_gain.py"


@pytest.fixture
def options(tmp_path: Path) -> dict[str, Any]:
    """Return those of a short run on a tiny model."""
    return {
        "model": save_llama(tmp_path / "model", positions=128),
        "tokens": 2048,  # far beyond the model's positions
        "new-tokens": 12,
        "drafts": "off,3",
        "texts": "documents",
        "device": "cpu",
        "device-memory": "1GiB",
        "dtype": "float32",
        "json": tmp_path / "found.json",
    }


def run(monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], *more: str) -> None:
    given = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *given, *more])
    runpy.run_path(str(SCRIPT), run_name="__main__")


def test_answers_with_drafts_are_timed_beside_those_without(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    run(monkeypatch, options)
    document = json.loads(options["json"].read_text())
    alone, drafted = document["rows"]
    assert document["header"]["settings"]["tokens"] == "2048"
    assert (alone["draft"], drafted["draft"]) == ("off", "3")
    assert alone["verifications"] == 0 < drafted["verifications"]
    assert alone["text"]
    assert drafted["equal_part"] == 1.0
    assert drafted["of_the_first"] == drafted["seconds"] / alone["seconds"]


def test_a_run_that_was_cut_off_goes_on(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    answered = headinfer.generate

    def stopping(*given: Any, draft: str, **named: Any) -> Any:
        asked.append(draft)
        if asked == ["off", "3"]:
            raise KeyboardInterrupt
        return answered(*given, draft=draft, **named)

    monkeypatch.setattr(headinfer, "generate", stopping)
    with pytest.raises(KeyboardInterrupt):
        run(monkeypatch, options)
    run(monkeypatch, options, "--resume")
    assert asked == ["off", "3", "3"]
    alone, drafted = json.loads(options["json"].read_text())["rows"]
    assert drafted["of_the_first"] == drafted["seconds"] / alone["seconds"]
    with pytest.raises(SystemExit, match=r"draft_gain.py: --resume: new_tokens was 12"):
        run(monkeypatch, options | {"new-tokens": 13}, "--resume")
