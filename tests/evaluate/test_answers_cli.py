"""`headinfer evaluate needle` as users run it, with workers in processes of their own."""

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
from answers_parts import FakeWorkers, answers_spec, record
from rich.console import Console
from typer.testing import CliRunner

from headinfer.bench.result import Status
from headinfer.cli import evaluate, evaluate_answers
from headinfer.evaluate.answers.document import Answers
from headinfer.evaluate.answers.run import AnswersRow
from headinfer.evaluate.answers.table import render
from saved_models import WORDS, save_llama


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return str(save_llama(tmp_path_factory.mktemp("models") / "tiny"))


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> str:
    file: Path = tmp_path_factory.mktemp("texts") / "text.txt"
    file.write_text(". ".join(" ".join(WORDS[at : at + 7]) for at in range(80)) + ".")
    return str(file)


def run(*arguments: str):
    return CliRunner().invoke(evaluate.app, ["needle", *arguments])


@pytest.fixture
def fakes(monkeypatch):
    """Replace the workers; what they answer follows from the job."""

    def job(job):
        for number in range(len(job.task["depths"]) * job.task["samples"]):
            if f"q{number}" not in job.done:
                yield record(f"q{number}")

    workers = FakeWorkers(job)
    monkeypatch.setattr(evaluate_answers, "make_launcher", lambda: workers)
    return workers


@pytest.mark.slow
def test_answers_are_written_with_a_header(model, text, tmp_path):
    path = tmp_path / "out.json"
    result = run(
        *("--model", model, "--text", text, "--contexts", "160,100", "--depths", "3"),
        *("--methods", "standard,chunked-prefill,headinfer", "--device", "simulated"),
        *("--tile-tokens", "16", "--chunk-tokens", "37", "--threads", "1", "--json", str(path)),
    )
    assert result.exit_code == 0, result.stderr
    assert result.stdout == ""
    document = json.loads(path.read_text())
    head, rows = document["header"], document["rows"]
    assert head["command"] == "needle"
    assert (head["device"], head["dtype"]) == ("cpu", "float32")
    assert head["spec"]["contexts"] == [100, 160]
    assert head["spec"]["task"]["depths"] == [0, 0.5, 1]
    assert {"date", "commit", "hardware", "versions", "model", "settings"} <= set(head)
    assert [(row["method"], row["context_tokens"]) for row in rows] == [
        (method, context)
        for context in (100, 160)
        for method in ("standard", "chunked-prefill", "headinfer")
    ]
    for row in rows:
        assert (row["status"], len(row["records"]), row["is_finished"]) == ("ok", 3, True)
        stock = next(
            each
            for each in rows
            if (each["method"], each["context_tokens"]) == ("standard", row["context_tokens"])
        )
        assert [each["answer"]["tokens"] for each in row["records"]] == [
            each["answer"]["tokens"] for each in stock["records"]
        ]
    assert "headinfer at 160 tokens: 3 answers, score 0%" in result.stderr
    assert "left" in result.stderr
    assert "3/3" in result.stderr


@pytest.mark.slow
def test_a_cap_that_stock_outgrows_leaves_it_prompts_cut_in_the_middle(tmp_path, text):
    wide = str(
        save_llama(tmp_path / "wide", positions=2**17, head_dim=1024)
    )  # 32 KiB of KV a token
    path = tmp_path / "out.json"
    result = run(
        *("--model", wide, "--text", text, "--contexts", "6K", "--depths", "0.5"),
        *("--methods", "chunked-prefill,headinfer", "--device", "simulated"),
        *("--device-memory", "80MiB", "--chunk-tokens", "512", "--json", str(path)),
    )
    assert result.exit_code == 0, result.stderr
    stock, ours = json.loads(path.read_text())["rows"]
    assert ours["limit_tokens"] is None
    assert ours["records"][0]["answer"]["read_tokens"] > 6000
    assert stock["status"] == "ok"
    assert 16 < stock["limit_tokens"] < 6144
    assert stock["records"][0]["answer"]["read_tokens"] == stock["limit_tokens"] - 16
    assert "simulated GPU memory held to 80MiB; longer prompts are cut" in result.stderr


def test_a_run_that_was_stopped_goes_on(model, text, tmp_path, fakes):
    path = tmp_path / "out.json"
    given = ("--model", model, "--text", text, "--contexts", "100", "--json", str(path))

    def stopped(job):
        yield record("q0")
        if job.method == "headinfer":
            raise KeyboardInterrupt
        yield from (record(f"q{number}") for number in range(1, 5))

    whole, fakes._job = fakes._job, stopped
    result = run(*given)
    assert result.exit_code == 130
    assert "holds what is finished; --resume goes on from there" in result.stderr
    assert "headinfer at 100: not finished" in result.stderr
    kept = json.loads(path.read_text())["rows"]
    assert [len(row["records"]) for row in kept] == [5, 1]
    fakes._job = whole
    result = run(*given, "--resume")
    assert result.exit_code == 0, result.stderr
    assert [(job.method, job.done) for job in fakes.jobs[2:]] == [("headinfer", ("q0",))]
    rows = json.loads(path.read_text())["rows"]
    assert [len(row["records"]) for row in rows] == [5, 5]


def test_going_on_takes_other_contexts_methods_and_more_samples(model, text, tmp_path, fakes):
    path = tmp_path / "out.json"
    given = ("--model", model, "--text", text, "--depths", "2", "--json", str(path))
    assert run(*given, "--contexts", "100", "--methods", "standard").exit_code == 0
    result = run(
        *(*given, "--contexts", "200", "--methods", "bounded", "--samples", "2", "--resume")
    )
    assert result.exit_code == 0, result.stderr
    document = json.loads(path.read_text())
    assert document["header"]["spec"]["methods"] == ["bounded", "standard"]
    assert {
        (row["method"], row["context_tokens"]): len(row["records"]) for row in document["rows"]
    } == {(method, context): 4 for method in ("bounded", "standard") for context in (100, 200)}


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--seed", "1"), "--resume: seed was 0 in the results and is 1 now"),
        (("--depths", "2"), "--resume: depths was [0.0, 0.25, 0.5, 0.75, 1.0]"),
        (("--dtype", "bfloat16"), "--resume: dtype was 'float32' in the results"),
        (("--tile-tokens", "32"), "--resume: settings was"),
    ],
)
def test_results_of_another_run_are_not_gone_on_with(model, text, tmp_path, fakes, arguments, told):
    path = tmp_path / "out.json"
    given = ("--model", model, "--text", text, "--contexts", "100", "--json", str(path))
    assert run(*given).exit_code == 0
    before = path.read_text()
    result = run(*given, "--resume", *arguments)
    assert result.exit_code == 2
    assert told in result.stderr
    assert path.read_text() == before


@pytest.mark.parametrize(
    ("machine", "told"),
    [
        ({"device": "cuda"}, "measured with other device"),
        ({"hardware": {"cpu": "another", "gpu": None}}, "measured with other hardware"),
    ],
)
def test_results_of_another_machine_are_not_gone_on_with(
    model, text, tmp_path, fakes, monkeypatch, machine, told
):
    path = tmp_path / "out.json"
    given = ("--model", model, "--text", text, "--contexts", "100", "--json", str(path))
    assert run(*given).exit_code == 0
    here = fakes.machine("cpu")
    monkeypatch.setattr(fakes, "machine", lambda _device: here | machine)
    result = run(*given, "--resume")
    assert result.exit_code == 2
    assert told in result.stderr


def test_results_of_another_verb_are_not_gone_on_with(model, text, tmp_path, fakes):
    path = tmp_path / "out.json"
    given = ("--model", model, "--contexts", "100", "--json", str(path))
    assert run(*given, "--text", text).exit_code == 0
    arguments = ["scbench", *given, "--data", "made", "--tasks", "kv", "--resume"]
    result = CliRunner().invoke(evaluate.app, arguments)
    assert result.exit_code == 2
    assert "--resume: the file holds results of needle, not of scbench" in result.stderr


def test_a_wrong_answer_is_exit_code_1(model, text, fakes):
    fakes._job = lambda job: (
        record(f"q{number}", (5, 6 + (job.method == "headinfer"))) for number in range(5)
    )
    result = run("--model", model, "--text", text, "--contexts", "100")
    assert result.exit_code == 1
    assert "headinfer: WRONG RESULT: an exact method must answer as stock does" in result.stderr


def test_without_contexts_they_double_up_to_the_models_positions(tmp_path, text, fakes):
    model = str(save_llama(tmp_path / "model", positions=5000))
    result = run("--json", "--model", model, "--text", text, "--methods", "standard")
    assert json.loads(result.stdout)["header"]["spec"]["contexts"] == [1024, 2048, 4096]


def test_contexts_beyond_the_models_positions_are_noted(model, text, fakes):
    result = run("--model", model, "--text", text, "--contexts", "1K")
    assert "note: the model was made for 512 positions" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--methods", "magic"), "there is no method 'magic'"),
        (("--methods", "standard,standard-compiled"), "'standard-compiled' cannot be evaluated"),
        (("--contexts", "9,,8"), "has a comma too many"),
        (("--contexts", "9,9"), "a context is named twice"),
        (("--depths", "half"), "--depths 'half' names no depths"),
        (("--depths", "0.5,2"), "a depth is from 0 to 1, not 2"),
        (("--depths", "nan"), "a depth is from 0 to 1, not nan"),
        (("--text", "missing.txt"), "--text 'missing.txt' cannot be read"),
        (("--tile-heads", "none"), "--tile-heads"),
        (("--model", "llama-3-8b"), "llama-3-8b"),
        (("--model", "./nowhere"), "is neither a folder nor a model id"),
        (("--json", "no/such/folder.json"), "there is no folder to write it in"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments, told, model, text, fakes):
    given = {"--model": model, "--text": text} | {arguments[0]: arguments[1]}
    result = run(*(word for pair in given.items() for word in pair))
    assert result.exit_code == 2
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("headinfer: error")]
    assert told in line
    assert "Traceback" not in result.stderr
    assert fakes.jobs == []


def test_going_on_without_a_file_is_refused(model, text, fakes):
    result = run("--model", model, "--text", text, "--resume")
    assert result.exit_code == 2
    assert "--resume goes on with what --json FILE holds" in result.stderr


@pytest.mark.parametrize("content", ["{", "[]", '{"header": {"format": 99}}', '{"rows": []}'])
def test_files_that_hold_no_answers_are_refused(content, model, text, tmp_path, fakes):
    path = tmp_path / "out.json"
    path.write_text(content)
    result = run("--model", model, "--text", text, "--json", str(path), "--resume")
    assert result.exit_code == 2
    assert "out.json" in result.stderr
    assert path.read_text() == content


def wide_results() -> Answers:
    spec = answers_spec("standard", "transformers-offloaded", contexts=(128 * 1024,))
    results = Answers.new(spec, FakeWorkers(lambda _job: iter(())).machine("cpu"))
    for method in spec.methods:
        row = AnswersRow(method=method, context_tokens=128 * 1024, exact=True, is_finished=True)
        records = [record(f"q{number}", (5, 6)) for number in range(123)]
        slow = [
            replace(each, answer=replace(each.answer, prefill_s=12345.6, decode_s=12.3))
            for each in records
        ]
        results.rows[row.key] = replace(row, records=tuple(slow), status=Status.OK)
    return results


def test_the_table_fits_80_columns():
    shown = io.StringIO()
    Console(file=shown, width=80).print(render(wide_results()))
    lines = shown.getvalue().splitlines()
    (row,) = [line for line in lines if line.startswith("transformers-offloaded")]
    assert row.split() == [
        *("transformers-offloaded", "128K", "100", "123", "100.0", "123/123", "0"),
        *("12346", "12300"),
    ]
    assert max(map(len, lines)) <= 80
