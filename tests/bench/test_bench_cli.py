"""The commands as users run them; sizes tiny, times not looked at."""

import json

import pytest
import torch
from bench_parts import FakeLauncher
from typer.testing import CliRunner

from headinfer.bench.methods import METHODS, HeadInfer
from headinfer.bench.trial import attempt
from headinfer.cli import bench

REQUIRED = {
    "method",
    "context_tokens",
    "prefill_s",
    "decode_s_per_token",
    "peak_rss_growth_bytes",
    "kv_bytes",
    "bound_s",
}
TINY_TEXT = "--layers 1 --hidden-size 64 --heads 4 --kv-heads 2 --head-dim 16 --vocab-size 97"
TINY = TINY_TEXT.split()


@pytest.fixture
def in_process(monkeypatch):
    """Trials in this process: the same code, without the seconds of a start."""
    monkeypatch.setattr(bench, "make_launcher", lambda: FakeLauncher(attempt))


def run(*arguments: str):
    return CliRunner().invoke(bench.app, [*arguments, *TINY])


def check_document(text: str, command: str) -> dict:
    document = json.loads(text)
    header = document["header"]
    assert header["command"] == command
    assert header["versions"]["torch"] == torch.__version__
    assert header["model"]["kv_heads"] == 2
    assert header["seed"] == 0
    assert header["rates"]["host_bytes_per_s"] > 0
    for row in document["rows"]:
        assert set(row) >= REQUIRED
        assert all(row[name] is not None for name in REQUIRED)
        assert row["status"] == "ok"
        assert row["gate"]["passed"]
    return document


def test_decode_in_fresh_processes_writes_a_file(tmp_path):
    path = tmp_path / "out.json"
    result = run("decode", "--context", "300", "--new-tokens", "2", "--json", str(path))
    assert result.exit_code == 0, result.stderr
    assert result.stdout == ""
    assert "headinfer" in result.stderr
    rows = check_document(path.read_text(), "decode")["rows"]
    assert [row["method"] for row in rows] == ["standard", "headinfer"]
    assert rows[1]["kv_bytes"] == 302 * 2 * 2 * 16 * 2
    assert len(rows[1]["decode_samples_s"][0]) == 2


def test_prefill_prints_json_alone_to_stdout(in_process):
    result = run("prefill", "--context", "512", "--dtype", "float32", "--repeats", "2", "--json")
    assert result.exit_code == 0, result.stderr
    rows = check_document(result.stdout, "prefill")["rows"]
    assert rows[1]["repeats"] == 2
    assert rows[1]["new_tokens"] == 1
    assert rows[1]["bound_s"] == rows[1]["prefill_bound_s"]


def test_a_bare_json_may_stand_before_other_options(in_process):
    arguments = ("--json", "--methods", "standard", "--context", "64", "--new-tokens", "1")
    result = run("decode", *arguments)
    assert result.exit_code == 0, result.stderr
    assert len(json.loads(result.stdout)["rows"]) == 1


def test_a_wrong_method_is_a_failed_row_and_exit_code_1(in_process, monkeypatch):
    class Damaged(HeadInfer):
        def new_cache(self, max_tokens):
            cache = super().new_cache(max_tokens)
            update = cache.layers[0].update
            cache.layers[0].update = lambda keys, values, *rest: update(-keys, values, *rest)
            return cache

    monkeypatch.setitem(METHODS, "headinfer", Damaged)
    result = run("decode", "--context", "300", "--new-tokens", "1", "--json")
    assert result.exit_code == 1
    row = json.loads(result.stdout)["rows"][1]
    assert row["status"] == "mismatch"
    assert row["decode_s_per_token"] is None
    assert "WRONG RESULT" in result.stderr


def test_a_method_that_cannot_run_is_a_row(in_process):
    arguments = ("--context", "300", "--new-tokens", "1", "--device-memory", "1KiB", "--json")
    result = run("decode", "--device", "cpu", *arguments)
    assert result.exit_code == 0, result.stderr
    standard, ours = json.loads(result.stdout)["rows"]
    assert standard["status"] == "ok"
    assert ours["status"] == "cannot_run"
    assert "below the weights" in ours["reason"]
    assert "cannot run" in result.stderr


def test_nothing_runs_on_a_device_that_is_not_there(in_process, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = run("decode", "--context", "300", "--device", "cuda", "--json")
    assert result.exit_code == 1
    rows = json.loads(result.stdout)["rows"]
    assert [row["status"] for row in rows] == ["cannot_run", "cannot_run"]
    assert all("CUDA is not available" in row["reason"] for row in rows)


def test_no_options_at_all(in_process, monkeypatch):
    measured = []
    monkeypatch.setattr(bench, "run_suite", lambda spec, *_: measured.append(spec) or [])
    result = CliRunner().invoke(bench.app, ["decode"])
    assert result.exit_code == 1, result.stderr  # nothing was measured
    assert measured[0].contexts == (32 * 1024,)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--context many", "'many' is not a token count"),
        ("--methods standard,magic", "no method 'magic'"),
        ("--methods ,", "no methods"),
        ("--dtype int8", "dtype must be one of"),
        ("--kv-heads 3", "multiple of kv_heads"),
        ("--repeats 0", "repeats must be at least 1"),
        ("--tile-heads 0", "tile_heads must be a positive number"),
        ("--json /no/such/folder/out.json", "no folder"),
    ],
)
def test_bad_options_are_one_line_and_exit_code_2(arguments, words):
    result = CliRunner().invoke(bench.app, ["decode", *TINY, *arguments.split()])
    assert result.exit_code == 2
    assert words in result.stderr
    assert result.stderr.count("\n") == 1
