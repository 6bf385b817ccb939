"""The commands as users run them; sizes tiny, times not looked at."""

import json
import os
import signal
import sys
from math import nan

import pytest
import torch
from bench_parts import FakeLauncher, trial_result
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from headinfer.bench import quantised
from headinfer.bench.catalogue import CATALOGUE
from headinfer.bench.methods import METHODS
from headinfer.bench.ours import HeadInfer
from headinfer.bench.result import Status, TrialFailure
from headinfer.bench.suite import GATE_TOKENS
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
    # Some builds of torch name their kind of device in one of both only.
    assert header["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert header["model"]["kv_heads"] == 2
    assert header["seed"] == 0
    assert header["rates"]["host_bytes_per_s"] > 0
    for row in document["rows"]:
        assert set(row) >= REQUIRED
        assert all(row[name] is not None for name in REQUIRED)
        assert row["status"] == "ok"
        assert row["gate"]["passed"]
    return document


@pytest.mark.slow
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
            cache.layers[0].update = lambda keys, *rest, **named: update(-keys, *rest, **named)
            return cache

    monkeypatch.setitem(METHODS, "headinfer", Damaged)
    result = run("decode", "--context", "300", "--new-tokens", "1", "--json")
    assert result.exit_code == 1
    row = json.loads(result.stdout)["rows"][1]
    assert row["status"] == "mismatch"
    assert row["decode_s_per_token"] is None
    assert "WRONG RESULT" in result.stderr


def test_methods_that_cannot_run_are_rows_that_say_why(in_process, monkeypatch):
    monkeypatch.setattr(quantised, "_installed", lambda _module: False)
    why = {
        "transformers-offloaded": "needs a GPU",
        "kv-4bit": "pip install optimum optimum-quanto",
        "head-wise-8": "has 2 KV heads",
        "resident": "--device simulated",
        "host-attention": "--device simulated",
        "synchronous": "nothing can overlap",
    }
    arguments = ("--methods", ",".join(("standard", *why)), "--context", "300", "--new-tokens", "1")
    result = run("decode", "--device", "cpu", *arguments, "--json")
    assert result.exit_code == 0, result.stderr
    standard, *others = json.loads(result.stdout)["rows"]
    assert standard["status"] == "ok"
    assert [row["method"] for row in others] == list(why)
    for row in others:
        assert row["status"] == "cannot_run"
        assert why[row["method"]] in row["reason"]
        assert row["reason"] in " ".join(result.stderr.split())


def test_nothing_runs_on_a_device_that_is_not_there(in_process, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = run("decode", "--context", "300", "--device", "cuda", "--json")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "CUDA is not available" in str(result.exception) + result.stderr


def fake_launcher(monkeypatch, answer=lambda _: trial_result(tokens=(3,), decode_s=(0.5,))):
    launcher = FakeLauncher(answer)
    monkeypatch.setattr(bench, "make_launcher", lambda: launcher)
    return launcher


def test_resume_measures_what_is_missing_and_nothing_else(tmp_path, monkeypatch):
    arguments = ("decode", "--repeats", "1", "--json", str(tmp_path / "out.json"))
    fake_launcher(monkeypatch)
    assert run(*arguments, "--contexts", "100,200").exit_code == 0
    launcher = fake_launcher(monkeypatch)
    more = ("--contexts", "100,200,300", "--methods", "standard,headinfer,bounded", "--resume")
    result = run(*arguments, *more)
    assert result.exit_code == 0, result.stderr
    checks = [("standard", 300), ("headinfer", 300), ("bounded", 300)]  # nothing else to hold to
    assert launcher.asked[:3] == checks
    assert launcher.asked[3:] == [("bounded", 100), ("bounded", 200), *checks]
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert [(row["method"], row["context_tokens"]) for row in rows] == [
        (method, context)
        for context in (100, 200, 300)
        for method in ("standard", "headinfer", "bounded")
    ]
    assert all(row["decode_x_standard"] == 1 for row in rows)
    assert run(*arguments, *more).exit_code == 0
    assert len(launcher.asked) == 8


def test_what_is_finished_is_kept_when_a_run_is_stopped(tmp_path, monkeypatch):
    def answer(spec):
        if (spec.method, spec.context_tokens) == ("headinfer", 200):
            raise KeyboardInterrupt
        return trial_result(tokens=(3,), decode_s=(0.5,))

    path = tmp_path / "out.json"
    arguments = ("decode", "--contexts", "100,200", "--json", str(path))
    fake_launcher(monkeypatch, answer)
    result = run(*arguments)
    assert result.exit_code == 130
    assert "--resume goes on" in result.stderr
    assert len(json.loads(path.read_text())["rows"]) == 3
    launcher = fake_launcher(monkeypatch)
    assert run(*arguments, "--resume").exit_code == 0
    assert launcher.asked[-1] == ("headinfer", 200)
    assert len(json.loads(path.read_text())["rows"]) == 4


def test_checks_are_kept_when_a_run_is_stopped_before_its_first_row(tmp_path, monkeypatch):
    def answer(spec):
        if spec.method == "bounded":
            raise KeyboardInterrupt
        return trial_result(tokens=(3,), decode_s=(0.5,))

    path = tmp_path / "out.json"
    methods = ("--methods", "headinfer,bounded")
    arguments = ("decode", "--context", "8000", *methods, "--json", str(path))
    fake_launcher(monkeypatch, answer)
    assert run(*arguments).exit_code == 130
    assert set(json.loads(path.read_text())["checks"]) == {"standard", "headinfer"}
    launcher = fake_launcher(monkeypatch)
    assert run(*arguments, "--resume").exit_code == 0
    assert launcher.asked == [
        ("bounded", GATE_TOKENS),
        ("headinfer", 8000),
        ("bounded", 8000),
    ]


@pytest.mark.skipif(sys.platform == "win32", reason="its signals end a process")
@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGHUP", 129), ("SIGINT", 130)])
def test_a_signal_keeps_what_is_finished(tmp_path, monkeypatch, name, code):
    def answer(spec):
        if (spec.method, spec.context_tokens) == ("headinfer", 200):
            os.kill(os.getpid(), getattr(signal, name))
        return trial_result(tokens=(3,), decode_s=(0.5,))

    fake_launcher(monkeypatch, answer)
    path = tmp_path / "out.json"
    for target in ((), (str(path),)):
        result = run("decode", "--contexts", "100,200", "--json", *target)
        assert result.exit_code == code
        document = path.read_text() if target else result.stdout
        assert len(json.loads(document)["rows"]) == 3
        assert "headinfer" in result.stderr
        assert "Traceback" not in result.stderr
    assert "--resume goes on" in result.stderr


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ("--seed 1", "seed was 0 in the results and is 1 now"),
        ("--new-tokens 3", "--new-tokens was 8"),
        ("--device-memory 1GiB", "settings was"),
    ],
)
def test_resume_refuses_results_of_another_run(tmp_path, monkeypatch, other, words):
    arguments = ("decode", "--context", "100", "--json", str(tmp_path / "out.json"))
    fake_launcher(monkeypatch)
    assert run(*arguments).exit_code == 0
    result = run(*arguments, "--resume", *other.split())
    assert result.exit_code == 2
    assert words in result.stderr


def test_the_longest_context_is_found(monkeypatch):
    def answer(spec):
        short = spec.context_tokens <= 5000
        return trial_result(tokens=(3,), decode_s=(0.5,)) if short else lack

    lack = TrialFailure(status=Status.CANNOT_RUN, reason="out of memory: all", grows=True)
    fake_launcher(monkeypatch, answer)
    result = run("max-context", "--contexts", "1K,64K", "--methods", "standard,bounded", "--json")
    assert result.exit_code == 0, result.stderr
    rows = json.loads(result.stdout)["rows"]
    assert [row["context_tokens"] for row in rows] == [4096, 4096]
    assert "bounded: ends at 5K: cannot run: out of memory: all" in result.stderr
    assert all("out of memory" in row["limited_by"] for row in rows)


def test_no_context_is_left_out_of_the_search(monkeypatch):
    launcher = fake_launcher(monkeypatch)
    result = run("max-context", "--contexts", "1K,2K,3K")
    assert result.exit_code == 2
    assert "takes one or two contexts" in result.stderr
    assert launcher.asked == []


@pytest.mark.skipif(sys.platform == "win32", reason="it has neither")
def test_results_replace_neither_devices_nor_pipes(tmp_path, monkeypatch):
    launcher = fake_launcher(monkeypatch)
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "null").symlink_to("/dev/null")
    for name in ("pipe", "null"):
        result = run("decode", "--context", "100", "--json", str(tmp_path / name))
        assert result.exit_code == 2
        assert "must be a file" in result.stderr
    assert launcher.asked == []


@pytest.mark.parametrize("verb", ["memory", "ablation"])
def test_the_other_verbs_measure_all_methods(monkeypatch, verb):
    launcher = fake_launcher(monkeypatch)
    result = run(verb, "--context", "300", "--json")
    assert result.exit_code == 0, result.stderr
    rows = json.loads(result.stdout)["rows"]
    assert {"standard", "head-wise-1", "headinfer"} <= {row["method"] for row in rows}
    assert len(launcher.asked) == len(rows)


def test_a_preset_needs_neither_network_nor_a_run_of_its_size(monkeypatch):
    launcher = fake_launcher(monkeypatch)
    arguments = ["decode", "--model", "llama-3-8b", "--dummy-weights", "--context", "300"]
    result = CliRunner().invoke(bench.app, [*arguments, "--json"])
    assert result.exit_code == 0, result.stderr
    document = json.loads(result.stdout)
    assert document["rows"][0]["kv_bytes"] == 308 * 128 * 1024
    assert document["header"]["model"]["name"] == "llama-3-8b"
    assert launcher.asked


def test_methods_are_told():
    result = CliRunner().invoke(bench.app, ["methods"])
    assert result.exit_code == 0
    assert all(name in result.stdout for name in METHODS)
    assert set(CATALOGUE) == set(METHODS)


def test_no_options_at_all(monkeypatch):
    asked = FakeLauncher(lambda _: TrialFailure(status=Status.CANNOT_RUN, reason="made up"))
    monkeypatch.setattr(bench, "make_launcher", lambda: asked)
    result = CliRunner().invoke(bench.app, ["decode"])
    assert result.exit_code == 1, result.stderr  # nothing was measured
    assert ("headinfer", GATE_TOKENS) in asked.asked
    assert "32K" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--context many", "'many' is not a token count"),
        ("--methods standard,magic", "no method 'magic'"),
        ("--methods ,", "no methods"),
        ("--contexts 1K,1K", "named twice"),
        ("--contexts 1K,,2K", "a comma too many"),
        ("--device-memory 24", "--device-memory: '24' is in bytes"),
        ("--methods standard,,headinfer", "a comma too many"),
        ("--model llama-3-8b", "is for models without --model"),
        ("--dummy-weights", "needs --model"),
        ("--resume", "give the file"),
        ("--time-limit 0", "--time-limit must be at least 1"),
        ("--dtype int8", "--dtype must be one of"),
        ("--kv-heads 3", "multiple of --kv-heads"),
        ("--gpus 0", "--gpus must be at least 1"),
        ("--methods layers", "method 'layers' needs several GPUs"),
        ("--methods layers --gpus 2", "there are 2 GPUs, and layers of the model: 1;"),
        ("--gpus 2 --device-memory 1GiB,2GiB", "holds for each GPU, and not a list"),
        ("--repeats 0", "--repeats must be at least 1"),
        ("--tile-heads 0", "--tile-heads must be a positive integer"),
        ("--json /no/such/folder/out.json", "no folder"),
    ],
)
def test_bad_options_are_one_line_and_exit_code_2(arguments, words):
    shape = [] if "heads" in arguments else TINY  # for options are given once
    result = CliRunner().invoke(bench.app, ["decode", *shape, *arguments.split()])
    assert result.exit_code == 2
    assert words in result.stderr
    assert result.stderr.count("\n") == 1


def save_model(folder, *, layers: int, stored_layers: int):
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=stored_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=97,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    config.num_hidden_layers = layers
    config.save_pretrained(folder)
    return ["decode", "--model", str(folder), "--context", "64", "--new-tokens", "1", "--json"]


def test_a_checkpoint_that_lacks_weights_ends_the_run(in_process, tmp_path):
    arguments = save_model(tmp_path, layers=3, stored_layers=2)
    result = CliRunner().invoke(bench.app, arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert "lacks 9 weights" in result.stderr.splitlines()[-1]


def test_a_checkpoint_with_weights_that_have_no_use_is_noted(in_process, tmp_path):
    arguments = save_model(tmp_path, layers=1, stored_layers=2)
    result = CliRunner().invoke(bench.app, arguments)
    assert result.exit_code == 0, result.stderr
    rows = json.loads(result.stdout)["rows"]
    assert all("no use for 9 weights" in row["note"] for row in rows)


def test_results_that_are_no_numbers_are_said_to_be_that(monkeypatch):
    fake_launcher(monkeypatch, lambda _: trial_result(tokens=(0,), logits=(nan, nan)))
    result = run("decode", "--context", "100", "--json")
    assert result.exit_code == 1
    assert "NaN" in json.loads(result.stdout)["rows"][0]["reason"]
    assert "damaged weights" in json.loads(result.stdout)["rows"][0]["reason"]
