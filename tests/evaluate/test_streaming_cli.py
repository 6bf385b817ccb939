"""Streaming heads as users of `headinfer evaluate` ask for them."""

import json
from pathlib import Path

import pytest
from answers_parts import FakeWorkers, record
from typer.testing import CliRunner

from headinfer.cli import evaluate, evaluate_answers
from headinfer.heads.formats import write_pattern
from headinfer.heads.pattern import HeadPattern
from saved_models import WORDS, save_llama


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return str(save_llama(tmp_path_factory.mktemp("models") / "tiny"))


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> str:
    file: Path = tmp_path_factory.mktemp("texts") / "text.txt"
    file.write_text(". ".join(" ".join(WORDS[at : at + 7]) for at in range(80)) + ".")
    return str(file)


@pytest.fixture
def pattern(tmp_path) -> str:
    path = tmp_path / "heads.json"
    write_pattern(path, HeadPattern(scores=((0.1, 0.9), (0.9, 0.1)), model="tiny"))
    return str(path)


def agreement(model: str, text: str, *arguments: str):
    file = ("--model", model, "--file", text, "--contexts", "100", "--device", "cpu")
    return CliRunner().invoke(evaluate.app, ["agreement", *file, *arguments])


def test_streaming_heads_are_those_of_the_pattern_and_leave_other_methods_exact(
    model, text, pattern, tmp_path
):
    found = {}
    for name, path in (("pattern", pattern), ("random", "random:3")):
        for recent in ("5", "40", "100"):
            json_path = tmp_path / f"{name}-{recent}.json"
            result = agreement(
                *(model, text, "--methods", "standard,head-wise-sparse,headinfer"),
                *("--sparsity", "0.5", "--head-pattern", path, "--json", str(json_path)),
                *("--sink-tokens", "2", "--recent-tokens", recent),
            )
            assert result.exit_code == 0, result.stderr
            rows = {row["method"]: row for row in json.loads(json_path.read_text())["rows"]}
            assert rows["headinfer"]["kl_max"] < 1e-6
            assert not rows["head-wise-sparse"]["exact"]
            assert f"2 sinks, {recent} newest tokens" in rows["head-wise-sparse"]["note"]
            found[name, recent] = rows["head-wise-sparse"]["kl_mean"]
    assert found["pattern", "5"] > found["pattern", "40"] > 1e-6
    assert found["pattern", "100"] < 1e-6  # the whole text is within reach
    assert abs(found["pattern", "5"] - found["random", "5"]) > 1e-6


def test_what_is_approximate_says_so_and_its_pattern_is_told(model, text, pattern):
    given = ("--methods", "head-wise-sparse", "--recent-tokens", "9")
    shown = agreement(model, text, *given, "--head-pattern", pattern)
    assert shown.exit_code == 0, shown.stderr
    told = " ".join(shown.output.split())
    assert "head-wise-sparse: not exact" in told
    assert "50% of KV heads stream, by heads.json, 9 newest tokens" in told  # half by default
    shown = agreement(model, text, *given, "--sparsity", "0.25")
    assert "25% of KV heads stream, by a random pattern" in " ".join(shown.output.split())


@pytest.mark.parametrize("verb", ["agreement", "needle"])
@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--sparsity", "0.5"), "--sparsity is heeded by the method head-wise-sparse alone"),
        (("--recent-tokens", "9"), "--recent-tokens is heeded by the method head-wise-sparse"),
        (("--sparsity", "2", "--methods", "head-wise-sparse"), "sparsity must be a share"),
        (("--head-pattern", "no.json", "--methods", "head-wise-sparse"), "'no.json': No such file"),
        (("--head-pattern", "random:x", "--methods", "head-wise-sparse"), "a number as its seed"),
        (("--head-pattern", "OTHER", "--methods", "head-wise-sparse"), "2 layers x 2 KV heads"),
    ],
)
def test_bad_input_is_one_line_before_anything_is_loaded(
    verb, arguments, told, model, text, tmp_path, monkeypatch
):
    workers = FakeWorkers(lambda job: iter([record("q0")]))
    monkeypatch.setattr(evaluate_answers, "make_launcher", lambda: workers)
    other = tmp_path / "other.json"
    write_pattern(other, HeadPattern(scores=((0.1,), (0.9,), (0.5,))))
    named = [str(other) if word == "OTHER" else word for word in arguments]
    where = "--file" if verb == "agreement" else "--text"
    given = [verb, "--model", model, where, text, "--contexts", "100", *named]
    result = CliRunner().invoke(evaluate.app, given)
    assert result.exit_code == 2
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("headinfer: error")]
    assert told in line
    assert workers.jobs == []
