"""The order of trials and the rows made of them, with trials made by hand."""

import io
import json
from dataclasses import replace

import pytest
from bench_parts import MACHINE, FakeLauncher, NoProgress, bench_spec, trial_result
from rich.console import Console

from headinfer.bench import child
from headinfer.bench.document import document
from headinfer.bench.result import Status, TrialFailure, from_json, to_json
from headinfer.bench.rows import Percentiles, Row
from headinfer.bench.spec import BenchSpec, TrialSpec
from headinfer.bench.suite import GATE_TOKENS, FreshProcesses, run_suite
from headinfer.bench.table import render

NO_MEMORY = TrialFailure(status=Status.CANNOT_RUN, reason="out of memory: 3 TiB")


def rows_of(spec: BenchSpec, launcher: FakeLauncher) -> list[Row]:
    return list(run_suite(spec, launcher, MACHINE, NoProgress()))


def test_rows_hold_medians_bounds_and_ratios():
    def answer(spec: TrialSpec):
        slow = spec.method == "standard"
        return trial_result(prefill_s=6.0 if slow else 2.0, decode_s=(0.4, 0.4) if slow else (0.1,))

    standard, ours = rows_of(bench_spec(), FakeLauncher(answer))
    assert (standard.method, ours.method) == ("standard", "headinfer")
    assert ours.status is Status.OK
    assert (ours.prefill_s, ours.decode_s_per_token) == (2.0, 0.1)
    assert (ours.prefill_x_standard, ours.decode_x_standard) == (3.0, pytest.approx(4.0))
    assert ours.kv_bytes == 302 * 2 * 2 * 2 * 16 * 4
    assert ours.bound_by == "host memory"
    assert ours.bound_s == ours.decode_bound_s
    assert ours.bound_fraction == pytest.approx(ours.bound_s / 0.1)
    assert standard.gate is not None
    assert standard.gate.passed


def test_repeats_are_pooled_and_methods_take_turns():
    seconds = iter([1.0, 5.0, 3.0, 4.0, 2.0, 3.0])
    launcher = FakeLauncher(lambda _: trial_result(prefill_s=next(seconds), decode_s=(1.0, 2.0)))
    standard, ours = rows_of(bench_spec(repeats=3), launcher)
    assert launcher.asked == [("standard", 300), ("headinfer", 300)] * 3
    assert (standard.prefill_s, ours.prefill_s) == (2.0, 4.0)
    assert ours.prefill_percentiles == Percentiles(
        p20=pytest.approx(3.4), p50=4.0, p80=pytest.approx(4.6)
    )
    assert ours.repeats == 3
    assert len(ours.decode_samples_s) == 3


def test_a_wrong_result_is_a_row_without_numbers():
    def answer(spec: TrialSpec):
        return trial_result(tokens=(3, 1, 4) if spec.method == "standard" else (3, 1, 5))

    standard, ours = rows_of(bench_spec(), FakeLauncher(answer))
    assert standard.status is Status.OK
    assert ours.status is Status.MISMATCH
    assert "greedy tokens" in ours.reason
    assert ours.decode_s_per_token is None
    assert ours.decode_x_standard is None


def test_a_wrong_result_in_any_repeat_counts():
    tokens = iter([(3, 1, 4), (3, 1, 4), (3, 1, 4), (3, 1, 5)])
    launcher = FakeLauncher(lambda _: trial_result(tokens=next(tokens)))
    assert rows_of(bench_spec(repeats=2), launcher)[1].status is Status.MISMATCH


def test_long_contexts_are_checked_on_a_short_prompt_before_any_timing():
    def answer(spec: TrialSpec):
        return trial_result(logits=(3.0, 4.0) if spec.method == "standard" else (3.0, 5.0))

    launcher = FakeLauncher(answer)
    ours = rows_of(bench_spec(contexts=(100_000,)), launcher)[1]
    assert launcher.asked == [
        ("standard", GATE_TOKENS),
        ("headinfer", GATE_TOKENS),
        ("standard", 100_000),
    ]
    assert ours.status is Status.MISMATCH
    assert ours.gate is not None
    assert ours.gate.context_tokens == GATE_TOKENS


def test_the_timed_trials_are_compared_too():
    def answer(spec: TrialSpec):
        late = spec.method == "headinfer" and spec.context_tokens == 100_000
        return trial_result(logits=(3.0, 5.0) if late else (3.0, 4.0))

    ours = rows_of(bench_spec(contexts=(100_000,)), FakeLauncher(answer))[1]
    assert ours.status is Status.MISMATCH
    assert ours.gate is not None
    assert ours.gate.context_tokens == 100_000


def test_a_method_alone_is_still_checked_against_the_reference():
    launcher = FakeLauncher(lambda _: trial_result())
    (ours,) = rows_of(bench_spec(methods=("headinfer",)), launcher)
    assert launcher.asked[0] == ("standard", 300)
    assert ours.status is Status.OK
    assert ours.decode_x_standard is None


def test_a_method_that_cannot_run_is_a_row_and_the_other_goes_on():
    def answer(spec: TrialSpec):
        short = spec.context_tokens <= GATE_TOKENS
        return trial_result() if short or spec.method == "headinfer" else NO_MEMORY

    launcher = FakeLauncher(answer)
    standard, ours = rows_of(bench_spec(contexts=(100_000,), repeats=2), launcher)
    assert standard.status is Status.CANNOT_RUN
    assert standard.reason == NO_MEMORY.reason
    assert ours.status is Status.OK
    assert ours.gate is not None
    assert ours.gate.context_tokens == GATE_TOKENS
    assert launcher.asked.count(("standard", 100_000)) == 1


def test_without_any_reference_a_result_is_not_called_right():
    def answer(spec: TrialSpec):
        return trial_result() if spec.method == "headinfer" else NO_MEMORY

    ours = rows_of(bench_spec(), FakeLauncher(answer))[1]
    assert ours.status is Status.UNCHECKED
    assert "nothing to compare" in ours.reason


@pytest.mark.parametrize(
    ("returncode", "status", "word"),
    [(-9, Status.CANNOT_RUN, "memory"), (-11, Status.FAILED, "-11"), (1, Status.FAILED, "Boom")],
)
def test_a_process_that_dies_is_a_failure(monkeypatch, returncode, status, word):
    def die(_module, _question):
        raise child.ChildError(returncode, "Traceback\nBoom: it broke\n")

    monkeypatch.setattr(child, "ask", die)
    outcome = FreshProcesses().trial(bench_spec().trial("standard", 300))
    assert isinstance(outcome, TrialFailure)
    assert outcome.status is status
    assert word in outcome.reason


def test_specs_and_outcomes_survive_json():
    spec = bench_spec().trial("headinfer", 300)
    assert TrialSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec
    for outcome in (trial_result(), NO_MEMORY):
        assert from_json(json.loads(json.dumps(to_json(outcome)))) == outcome


def test_the_table_fits_100_columns_and_tells_what_did_not_run():
    def answer(spec: TrialSpec):
        big = trial_result(prefill_s=1234.5, decode_s=(1.2605,), kv_host_bytes=2**38)
        return big if spec.method == "standard" else NO_MEMORY

    spec = bench_spec(contexts=(2**20,), dtype="bfloat16")
    launcher = FakeLauncher(lambda s: answer(s) if s.context_tokens > 5000 else trial_result())
    rows = rows_of(spec, launcher)
    rows[0] = replace(rows[0], planned_activation_bytes=123 * 2**20, decode_x_standard=123.4)
    console = Console(width=100, file=io.StringIO())
    console.print(render(spec, MACHINE, rows))
    text = console.file.getvalue()
    assert all(len(line.rstrip()) <= 100 for line in text.splitlines())
    for part in ("1234", "1260", "123.4", "123M", "1M", "headinfer: cannot run: out of memory"):
        assert part in text


def test_a_document_is_json_even_when_a_number_is_not():
    rows = rows_of(bench_spec(), FakeLauncher(lambda _: trial_result(logits=(float("nan"), 1.0))))
    assert rows[0].status is Status.MISMATCH
    text = json.dumps(document(bench_spec(), MACHINE, rows), allow_nan=False)
    assert json.loads(text)["rows"][0]["gate"]["logits_error"] is None
