"""Forms of KV in CPU memory beside each other in one run."""

import json
from dataclasses import replace

import pytest
from bench_parts import FakeLauncher, bench_spec, rows_of, trial_result
from typer.testing import CliRunner

from headinfer.bench.result import Status
from headinfer.bench.spec import TrialSpec
from headinfer.bench.table import notes
from headinfer.bench.trial import attempt
from headinfer.cli import bench

FORMS = ("dense", "packed", "int8")
METHODS = ("standard", "resident", "bounded", "headinfer-fp8")


def run(*arguments: str):
    return CliRunner().invoke(bench.app, [*arguments])


def forms_spec(**parts):
    return replace(bench_spec(methods=METHODS), kv_caches=FORMS, **parts)


def answer(spec: TrialSpec):
    form = spec.settings.kv_cache
    seconds = {"dense": 0.4, "packed": 0.3, "int8": 0.2}.get(form, 0.5)
    logits = (3.0, 5.0) if form == "int8" or spec.method == "headinfer-fp8" else (3.0, 4.0)
    result = trial_result(decode_s=(seconds,), logits=logits)
    return replace(result, format="dense" if form == "auto" else form)


def test_each_method_that_leaves_the_form_open_has_a_row_for_each():
    rows = rows_of(forms_spec(), FakeLauncher(answer))
    assert [(row.method, row.format) for row in rows] == [
        ("standard", "dense"),
        *((method, form) for method in ("resident", "bounded") for form in FORMS),
        ("headinfer-fp8", "dense"),  # the method has said so itself
    ]
    assert [row.kv_cache for row in rows] == [None, *FORMS, *FORMS, None]
    assert all(row.status is Status.OK for row in rows)
    assert [row.exact for row in rows] == [True, *(True, True, False) * 2, False]
    assert [row.decode_x_dense for row in rows[1:4]] == pytest.approx([1, 4 / 3, 2])
    assert rows[0].decode_x_dense is None


def test_a_lossless_form_that_is_wrong_has_no_numbers():
    def wrong(spec: TrialSpec):
        tokens = (3, 1, 5) if spec.settings.kv_cache == "packed" else (3, 1, 4)
        return replace(answer(spec), greedy_tokens=tokens)

    rows = rows_of(forms_spec(), FakeLauncher(wrong))
    of_form = {(row.method, row.kv_cache): row.status for row in rows}
    assert of_form["resident", "packed"] is of_form["bounded", "packed"] is Status.MISMATCH
    assert of_form["resident", "dense"] is Status.OK


def test_tables_name_the_form_where_there_are_several():
    spec = forms_spec()
    told = notes(spec, rows_of(spec, FakeLauncher(answer)))
    assert any(note.startswith("resident int8: not exact") for note in told)
    alone = replace(spec, kv_caches=("packed",))
    assert any(
        note.startswith("resident: KV packed")
        for note in notes(alone, rows_of(alone, FakeLauncher(answer)))
    )


def test_a_run_goes_on_with_further_forms(tmp_path, monkeypatch):
    asked: list[tuple[str, str]] = []

    def note(spec: TrialSpec):
        asked.append((spec.method, spec.settings.kv_cache))
        return replace(answer(spec), greedy_tokens=(3,), decode_s=(0.5,))

    monkeypatch.setattr(bench, "make_launcher", lambda: FakeLauncher(note))
    path = tmp_path / "out.json"
    arguments = ("decode", "--context", "300", "--methods", "resident", "--json", str(path))
    assert run(*arguments, "--kv-cache", "dense").exit_code == 0
    asked.clear()
    result = run(*arguments, "--kv-cache", "packed,int8", "--resume")
    assert result.exit_code == 0, result.output
    assert ("resident", "dense") not in asked
    rows = json.loads(path.read_text())["rows"]
    assert sorted(row["kv_cache"] for row in rows) == sorted(FORMS)
    assert {row["method"] for row in rows} == {"resident"}


def test_forms_that_do_nothing_or_stand_twice_are_refused():
    for given, words in (
        (("--methods", "standard", "--kv-cache", "dense,packed"), "no effect on standard"),
        (("--methods", "resident", "--kv-cache", "dense,dense"), "named twice"),
        (("--methods", "resident", "--kv-cache", "dense,int4"), "'int4'"),
    ):
        result = run("decode", "--context", "300", *given)
        assert result.exit_code == 2
        assert words in result.output + str(result.exception)


def test_forms_are_measured_on_the_simulated_device(monkeypatch):
    monkeypatch.setattr(bench, "make_launcher", lambda: FakeLauncher(attempt))
    shape = ("--layers", "1", "--hidden-size", "64", "--heads", "4", "--kv-heads", "2")
    result = run(
        *("decode", "--device", "simulated", *shape, "--head-dim", "16", "--vocab-size", "97"),
        *("--dtype", "bfloat16", "--context", "300", "--new-tokens", "2", "--chunk-tokens", "64"),
        *("--methods", "bounded", "--kv-cache", ",".join(FORMS), "--json"),
    )
    assert result.exit_code == 0, result.stderr
    rows = json.loads(result.stdout)["rows"]
    assert [row["format"] for row in rows] == list(FORMS)
    dense, packed, int8 = (row["bytes_to_device"] for row in rows)
    assert int8 < packed < dense
    assert [row["status"] for row in rows] == ["ok"] * 3


def test_where_no_form_is_named_only_headinfer_is_what_users_get() -> None:
    spec = bench_spec(methods=("standard", "resident", "headinfer", "headinfer-int8"))
    asked = [spec.trial(variant, 300).settings.kv_cache for variant in spec.variants]
    assert asked == ["auto", "dense", "auto", "auto"]  # the last one says it itself
    named = replace(spec, kv_caches=("packed",))
    asked = [named.trial(variant, 300).settings.kv_cache for variant in named.variants]
    assert asked == ["auto", "packed", "packed", "auto"]
