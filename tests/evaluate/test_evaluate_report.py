"""Result files as a document with plots."""

import json
import re
from dataclasses import replace

import pytest
from answers_parts import FakeWorkers, answers_spec, record
from typer.testing import CliRunner

from headinfer.bench.result import Status
from headinfer.cli import evaluate
from headinfer.evaluate.agreement.document import AgreementResults, header
from headinfer.evaluate.answers.document import Answers
from headinfer.evaluate.answers.run import AnswersRow
from headinfer.evaluate.needle.task import Needle
from headinfer.evaluate.report.document import report
from headinfer.plan.options import Options
from tiny_models import shared_model

MACHINE = FakeWorkers(lambda _job: iter(())).machine("cpu")


def found(depth: float, score: float, *, cut: int = 0, tokens=(5, 6), ties=None):
    return replace(
        record(f"depth {depth:g}", tokens, score, cut=cut, ties=ties), labels={"depth": depth}
    )


def needles(**changes) -> Answers:
    """Return needles at two depths: ours as stock but for a tie, and a method that was cut."""
    task = Needle(depths=(0.0, 1.0))
    methods = ("standard", "headinfer", "kv-4bit")
    spec = answers_spec(*methods, task=task, contexts=(1024, 2048), **changes)
    results = Answers.new(spec, MACHINE)
    stock = (found(0.0, 1.0, ties=(True, False)), found(1.0, 0.0))
    by_method = {
        "standard": stock,
        "headinfer": (found(0.0, 1.0, tokens=(9, 6)), stock[1]),
        "kv-4bit": (found(0.0, 0.0, cut=40), found(1.0, 0.0, cut=40)),
    }
    for method, records in by_method.items():
        limit = 976 if method == "kv-4bit" else None
        row = AnswersRow(
            method=method,
            context_tokens=1024,
            exact=method != "kv-4bit",
            is_finished=True,
            limit_tokens=limit,
            records=records,
        )
        results.rows[row.key] = row
    lacking = AnswersRow(
        method="standard",
        context_tokens=2048,
        exact=True,
        status=Status.CANNOT_RUN,
        reason="out of memory",
        is_finished=True,
    )
    results.rows[lacking.key] = lacking
    return results


def agreement() -> AgreementResults:
    from test_evaluate_cli import wide_results

    results = wide_results()
    model = shared_model("llama3")
    return replace(results, header=header(results.spec, model, "text.txt", "w1 w2", 2))


def test_cells_tell_the_score_the_cut_and_whether_answers_are_stocks():
    text = report([("file", needles())], "plots")
    assert "## Needle in a haystack (Figure 6)" in text
    assert "| context | standard | headinfer | kv-4bit ~ |" in text
    assert ("| 1K | 50.0 | 50.0, 1 of 2 as stock, 1 by a tie | 0.0, saw 60 |") in text
    assert "| 2K | - | - | - |" in text
    assert "![needle: score by method](plots/file.png)" in text
    assert "- standard: cannot run: out of memory" in text
    assert "- kv-4bit: not exact" in text


def test_groups_that_equal_stocks_are_not_told_twice():
    text = report([("file", needles())], "plots")
    assert "| standard | 0 | 1 |" in text
    assert "headinfer: by group, the scores of standard." in text
    assert "| kv-4bit ~ | 0 | 1 |" in text


def test_runs_under_a_cap_are_a_part_of_their_own_beside_the_papers_figures():
    capped = needles(settings=Options.parse(device="simulated", device_memory="640MiB"))
    text = report([("one", needles()), ("two", capped)], "plots")
    first, second = re.findall(r"^## (.*)$", text, re.MULTILINE)
    assert (first, second) == (
        "Needle in a haystack (Figure 6)",
        "Needle under one memory cap (Figure 6)",
    )
    assert "simulated GPU memory held to 640MiB" in text


def test_an_agreement_is_a_table():
    text = report([("file", agreement())], "plots")
    assert "## Agreement of next tokens" in text
    assert "| method | text | same token | differ | ties | KL mean | KL max |" in text
    assert "| transformers-offloaded | 128K | 12.345% | 123456 | 9999 |" in text


def run(*arguments: str):
    return CliRunner().invoke(evaluate.app, ["report", *arguments])


def test_a_document_and_its_plots_are_written(tmp_path):
    pytest.importorskip("matplotlib")
    for name, results in (("needles", needles()), ("agrees", agreement())):
        (tmp_path / f"{name}.json").write_text(json.dumps(results.to_json()))
    out, plots = tmp_path / "out.md", tmp_path / "plots"
    result = run(
        *(str(tmp_path / "needles.json"), str(tmp_path / "agrees.json")),
        *("--out", str(out), "--plots", str(plots)),
    )
    assert result.exit_code == 0, result.stderr
    assert "(plots/needles.png)" in out.read_text()
    assert [each.name for each in plots.iterdir()] == ["needles.png"]
    assert (plots / "needles.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("content", ["{", "[]", '{"header": {"command": "decode", "format": 1}}'])
def test_files_that_are_no_results_are_refused(tmp_path, content):
    file = tmp_path / "file.json"
    file.write_text(content)
    out = tmp_path / "out.md"
    result = run(str(file), "--out", str(out), "--plots", str(tmp_path / "plots"))
    assert result.exit_code == 2
    assert "file.json" in result.stderr
    assert "Traceback" not in result.stderr
    assert not out.exists()
