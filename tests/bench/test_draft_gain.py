"""The script that times drafts of a real model end to end."""

import json
import runpy
import sys
from pathlib import Path

import pytest

from saved_models import save_llama

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "draft_gain.py"


def test_answers_with_drafts_are_timed_beside_those_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, found = save_llama(tmp_path / "model", positions=128), tmp_path / "found.json"
    options = {
        "model": folder,
        "tokens": 2048,  # far beyond the model's positions
        "new-tokens": 12,
        "drafts": "off,3",
        "texts": "documents",
        "device": "cpu",
        "device-memory": "1GiB",
        "dtype": "float32",
        "json": found,
    }
    given = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *given])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    document = json.loads(found.read_text())
    alone, drafted = document["rows"]
    assert document["header"]["settings"]["tokens"] == "2048"
    assert (alone["draft"], drafted["draft"]) == ("off", "3")
    assert alone["verifications"] == 0 < drafted["verifications"]
    assert alone["text"]
    assert drafted["equal_part"] == 1.0
    assert drafted["of_the_first"] == drafted["seconds"] / alone["seconds"]
