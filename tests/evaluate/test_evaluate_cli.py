"""`headinfer evaluate agreement` as users run it."""

import io
import json
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from agreement_parts import agreement_spec
from rich.console import Console
from typer.testing import CliRunner

from headinfer.bench.methods import METHODS
from headinfer.bench.ours import HeadInfer
from headinfer.bench.result import Status
from headinfer.cli import evaluate
from headinfer.cli.main import app
from headinfer.evaluate.agreement.document import AgreementResults, header
from headinfer.evaluate.agreement.run import AgreementRow
from headinfer.evaluate.agreement.table import render, share
from saved_models import WORDS, save_llama, save_tokenizer
from tiny_models import shared_model, tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return str(save_llama(tmp_path_factory.mktemp("models") / "tiny"))


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> str:
    file: Path = tmp_path_factory.mktemp("texts") / "text.txt"
    file.write_text(" ".join(WORDS * 2))
    return str(file)


def run(*arguments: str, given: bytes | None = None):
    return CliRunner().invoke(evaluate.app, ["agreement", *arguments], input=given)


def test_rows_are_written_with_a_header(model, text, tmp_path):
    path = tmp_path / "out.json"
    result = run(
        *("--model", model, "--file", text, "--contexts", "100,8", "--dtype", "float32"),
        *("--methods", "standard,kv-4bit,headinfer", "--device", "simulated"),
        *("--tile-tokens", "16", "--resident-tokens", "32", "--json", str(path)),
    )
    assert result.exit_code == 0, result.stderr
    assert result.stdout == ""
    document = json.loads(path.read_text())
    head, rows = document["header"], document["rows"]
    spec = head["spec"]
    assert head["format"] == 2
    assert head["command"] == "agreement"
    assert head["dtype"] == "float32"
    assert head["device"] == "cpu"
    assert head["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert head["model"]["name"] == model
    assert spec["settings"]["tile_tokens"] == 16
    assert spec["settings"]["resident_tokens"] == 32
    assert head["text"]["name"] == text
    assert head["text"]["tokens"] == 180
    assert spec["contexts"] == [8, 100]
    assert spec["methods"] == ["standard", "kv-4bit", "headinfer"]
    assert head["stock_attention"] == "sdpa"
    assert {"date", "commit", "hardware", "most_pass_tokens"} <= set(head)
    assert [(row["method"], row["context_tokens"]) for row in rows] == [
        (method, context) for context in (8, 100) for method in spec["methods"]
    ]
    assert all(set(row) == {each.name for each in fields(AgreementRow)} for row in rows)
    ours = rows[-1]
    assert ours["status"] == "ok"
    assert (ours["positions"], ours["differing"], ours["agreement"]) == (100, 0, 1.0)
    assert 0 <= ours["kl_mean"] <= ours["kl_max"] < 1e-8
    assert "headinfer over 100 tokens: 100 of 100 tokens are stock's" in result.stderr
    assert "left" in result.stderr
    assert "100%" in result.stderr


def test_stdin_and_bare_json_and_the_whole_text(model):
    words = " ".join(WORDS[:40]).encode()
    methods = ("--methods", "standard,bounded", "--dtype", "bfloat16")
    result = run("--json", "--model", model, "--file", "-", *methods, given=words)
    assert result.exit_code == 0, result.stderr
    document = json.loads(result.stdout)
    assert document["header"]["spec"]["contexts"] == [40]
    for row in document["rows"]:
        assert row["kl_to_float32"] > 0
        assert row["stock_kl_to_float32"] > 0


def test_auto_takes_the_dtype_that_the_model_was_saved_in(model, text):
    result = run("--json", "--model", model, "--file", text, "--methods", "standard")
    assert json.loads(result.stdout)["header"]["dtype"] == "float32"


def test_stock_heeds_a_softcap(tmp_path, text):
    folder = tmp_path / "gemma2"
    tiny_model("gemma2").save_pretrained(folder)
    save_tokenizer(folder, chat=False)
    result = run("--json", "--model", str(folder), "--file", text, "--methods", "headinfer")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["header"]["stock_attention"] == "eager"


def test_an_exact_method_that_disagrees_is_exit_code_1(model, text, monkeypatch):
    class Damaged(HeadInfer):
        def new_cache(self, max_tokens):
            cache = super().new_cache(max_tokens)
            update = cache.layers[0].update
            cache.layers[0].update = lambda keys, *rest, **named: update(-keys, *rest, **named)
            return cache

    monkeypatch.setitem(METHODS, "headinfer", Damaged)
    result = run(
        "--model", model, "--file", text, "--methods", "standard,headinfer", "--dtype", "float32"
    )
    assert result.exit_code == 1
    assert "headinfer: WRONG RESULT: an exact method must agree with stock" in result.stderr


def test_nothing_compared_is_exit_code_1(model, text):
    result = run("--model", model, "--file", text, "--methods", "transformers-offloaded")
    if torch.cuda.is_available():
        pytest.skip("it runs here")
    assert result.exit_code == 1
    assert "cannot run: transformers offloads its cache" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--methods", "magic"), "there is no method 'magic'"),
        (("--methods", "standard,standard-compiled"), "'standard-compiled' cannot be evaluated"),
        (("--methods", "standard,standard"), "a method is named twice"),
        (("--contexts", "1K"), "the text has 180 tokens, and contexts go to 1,024"),
        (("--contexts", "9,,8"), "has a comma too many"),
        (("--contexts", "9,9"), "a context is named twice"),
        (("--tile-heads", "none"), "--tile-heads"),
        (("--file", "missing.txt"), "file 'missing.txt' cannot be read"),
        (("--model", "llama-3-8b"), "is a shape without weights"),
        (("--model", "./nowhere"), "is neither a folder nor a model id"),
        (("--json", "no/such/folder.json"), "there is no folder to write it in"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments, told, model, text):
    given = {"--model": model, "--file": text} | {arguments[0]: arguments[1]}
    result = run(*(word for pair in given.items() for word in pair))
    assert result.exit_code == 2
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("headinfer: error")]
    assert told in line
    assert "Traceback" not in result.stderr


def test_a_text_that_is_too_short_is_told_before_weights_are_loaded(model, text, monkeypatch):
    def never(*_given, **_named):
        raise AssertionError("it was loaded")

    monkeypatch.setattr("headinfer.generation.model.load_model", never)
    result = run("--model", model, "--file", text, "--contexts", "200")
    assert result.exit_code == 2
    assert "the text has 180 tokens" in result.stderr


@pytest.mark.parametrize("given", [b"", b" \n", b"\xff\xfe\x00"])
def test_texts_that_are_none_are_refused(given, model):
    result = run("--model", model, "--file", "-", given=given)
    assert result.exit_code == 2
    assert "stdin is " in result.stderr


def test_a_stopped_run_keeps_its_rows(model, text, tmp_path, monkeypatch):
    class Stopping(HeadInfer):
        def new_cache(self, max_tokens):
            raise KeyboardInterrupt

    monkeypatch.setitem(METHODS, "headinfer", Stopping)
    path = tmp_path / "out.json"
    methods = ("--methods", "standard,headinfer,bounded", "--json", str(path))
    result = run("--model", model, "--file", text, *methods)
    assert result.exit_code == 130
    assert [row["method"] for row in json.loads(path.read_text())["rows"]] == ["standard"]
    assert "100%" in result.stderr


def test_a_stopped_run_goes_on_with_what_is_missing(model, text, tmp_path):
    path = tmp_path / "out.json"
    given = ("--model", model, "--file", text, "--json", str(path), "--contexts")
    assert run(*given, "100", "--methods", "standard,bounded").exit_code == 0
    result = run(*given, "50,100", "--methods", "standard,headinfer", "--resume")
    assert result.exit_code == 0, result.stderr
    assert "standard over 100 tokens" not in result.stderr
    rows = json.loads(path.read_text())["rows"]
    assert [(row["method"], row["context_tokens"]) for row in rows] == [
        *((method, 50) for method in ("standard", "headinfer", "bounded")),
        *((method, 100) for method in ("standard", "headinfer", "bounded")),
    ]


def test_another_text_or_dtype_is_not_gone_on_with(model, text, tmp_path):
    path, other = tmp_path / "out.json", tmp_path / "other.txt"
    other.write_text(" ".join(WORDS))
    given = ("--model", model, "--json", str(path), "--contexts", "50", "--methods", "standard")
    assert run(*given, "--file", text).exit_code == 0
    kept = path.read_text()
    for changed, told in (
        (("--file", str(other)), "the results are of another text"),
        (("--file", text, "--dtype", "bfloat16"), "dtype was 'float32' in the results"),
    ):
        result = run(*given, *changed, "--resume")
        assert result.exit_code == 2
        assert f"--resume: {told}" in result.stderr
        assert path.read_text() == kept
    result = run("--model", model, "--file", text, "--resume")
    assert result.exit_code == 2
    assert "give the file" in result.stderr


def test_contexts_beyond_the_models_positions_are_noted(tmp_path, text):
    small = str(save_llama(tmp_path / "small", positions=64))
    result = run("--model", small, "--file", text, "--methods", "standard")
    assert result.exit_code == 0, result.stderr
    assert "note: the model was made for 64 positions" in result.stderr


def test_the_verb_is_a_verb_of_headinfer(model, text, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["headinfer", "evaluate"])
    with pytest.raises(SystemExit) as ended:
        app(["evaluate"])
    assert ended.value.code == 0
    assert "agreement" in capsys.readouterr().out
    with pytest.raises(SystemExit) as ended:
        app(["evaluate", "agreement", "--model", model])
    assert ended.value.code == 2
    assert "--file" in capsys.readouterr().err


def wide_results() -> AgreementResults:
    model = shared_model("llama3")
    spec = agreement_spec(model, "transformers-offloaded", dtype="bfloat16", contexts=(128 * 1024,))
    row = AgreementRow(
        method="transformers-offloaded",
        context_tokens=128 * 1024,
        exact=True,
        status=Status.OK,
        positions=131072,
        differing=123456,
        ties=9999,
        agreement=0.12345,
        kl_mean=1.23e-10,
        kl_max=1.23e-10,
        kl_to_float32=1.23e-10,
        stock_kl_to_float32=1.23e-10,
    )
    return AgreementResults(
        spec=spec, header=header(spec, model, "text.txt", "w1 w2", 2), rows=[row]
    )


def test_the_table_fits_80_columns():
    shown = io.StringIO()
    Console(file=shown, width=80).print(render(wide_results()))
    lines = shown.getvalue().splitlines()
    (row,) = [line for line in lines if line.lstrip().startswith("transformers-offloaded")]
    assert row.split() == [
        *("transformers-offloaded", "128K", "12.345%", "123456", "9999"),
        *["1.2e-10"] * 4,
    ]
    assert max(map(len, lines)) <= 80


def test_a_hundred_percent_is_all_of_them():
    (row,) = wide_results().rows
    changes = {each.name: getattr(row, each.name) for each in fields(row)}
    nearly = AgreementRow(**changes | {"differing": 1, "agreement": 1 - 1e-7})
    assert share(nearly) == "99.999%"
    assert share(AgreementRow(**changes | {"differing": 0, "agreement": 1.0})) == "100%"
