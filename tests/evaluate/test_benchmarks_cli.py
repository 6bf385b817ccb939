"""`headinfer evaluate longbench-v2` and `scbench` as users run them."""

import json

import pytest
from test_longbench import example, written
from test_scbench import folder, worded
from typer.testing import CliRunner

from headinfer.cli import evaluate
from saved_models import WORDS, save_llama


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return str(save_llama(tmp_path_factory.mktemp("models") / "tiny"))


def run(*arguments: str):
    return CliRunner().invoke(evaluate.app, list(arguments))


def shown(result) -> str:
    """Return what was told, as words: panels and tables break lines."""
    return " ".join(result.stderr.replace("│", " ").split())


@pytest.mark.slow
def test_long_questions_are_answered_and_scored_by_group(model, tmp_path):
    path = tmp_path / "out.json"
    data = written(
        tmp_path / "data.json",
        [
            example(number, context=" ".join(WORDS * 3), difficulty=difficulty)
            for number, difficulty in enumerate(("easy", "hard", "hard"))
        ],
    )
    result = run(
        *("longbench-v2", "--model", model, "--data", data, "--contexts", "120", "--json"),
        *(str(path), "--device", "simulated", "--samples", "2", "--tile-tokens", "16"),
    )
    assert result.exit_code == 0, result.stderr
    stock, ours = json.loads(path.read_text())["rows"]
    assert len(ours["records"]) == 2
    for one, other in zip(stock["records"], ours["records"], strict=True):
        assert one["answer"]["tokens"] == other["answer"]["tokens"]
        assert other["answer"]["read_tokens"] == 120 < other["measures"]["whole_tokens"]
    text = shown(result)
    assert "overall easy hard short medium long" in text
    assert "128 tokens an answer at most" in text
    assert "MADE-UP" not in text
    assert "2/2" in text


@pytest.mark.parametrize("mode", [pytest.param("multi-turn", marks=pytest.mark.slow), "scdq"])
def test_shared_contexts_are_computed_once_and_the_time_told(model, mode, tmp_path):
    path = tmp_path / "out.json"
    data = folder(tmp_path, scbench_vt=[worded(1), worded(5)])
    given = (
        *("scbench", "--model", model, "--data", data, "--contexts", "128", "--mode", mode),
        *("--device", "simulated", "--tile-tokens", "16", "--json", str(path)),
    )
    result = run(*given)
    assert result.exit_code == 0, result.stderr
    stock, ours = json.loads(path.read_text())["rows"]
    assert len(ours["records"]) == 6
    for one, other in zip(stock["records"], ours["records"], strict=True):
        assert one["answer"]["tokens"] == other["answer"]["tokens"]
    kept = sum(record["measures"]["reused_tokens"] for record in ours["records"])
    assert kept > 200
    text = shown(result)
    assert f"headinfer at 128: {kept:,} of " in text
    assert "prompt tokens not computed again, about" in text
    assert "average vt" in text
    assert f"{mode}: each question follows" in text
    again = run(*given, "--resume")
    assert again.exit_code == 0, again.stderr
    assert json.loads(path.read_text())["rows"] == [stock, ours]


def test_made_up_data_is_labelled_wherever_it_is_shown(model, tmp_path):
    path = tmp_path / "out.json"
    result = run(
        *("scbench", "--model", model, "--data", "made", "--tasks", "mf", "--samples", "1"),
        *("--contexts", "200", "--methods", "standard", "--json", str(path)),
    )
    assert result.exit_code == 0, result.stderr
    assert "MADE-UP examples in the benchmark's format, not SCBench itself" in shown(result)
    head = json.loads(path.read_text())["header"]
    assert head["spec"]["task"]["data"] == "made"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["longbench-v2", "--data", "none.json"], "--data 'none.json' cannot be read"),
        (["scbench", "--data", "none"], "no file or folder of SCBench's"),
        (["scbench", "--data", "made", "--tasks", "summary"], "not 'scbench_summary'"),
        (["scbench", "--data", "made", "--mode", "chat"], "--mode 'chat'"),
    ],
)
def test_bad_input_gets_one_line(arguments, message):
    result = run(*arguments, "--model", "none")
    assert result.exit_code == 2
    assert message in shown(result)
    assert "Traceback" not in result.stderr
    assert result.stdout == ""
