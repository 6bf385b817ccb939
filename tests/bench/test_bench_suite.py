"""The order of trials and the rows made of them, with trials made by hand."""

import io
import json
from dataclasses import replace

import pytest
from bench_parts import MACHINE, FakeLauncher, bench_spec, rows_of, trial_result
from rich.console import Console

from headinfer.bench import child
from headinfer.bench.document import Results, header
from headinfer.bench.forecast import Forecast
from headinfer.bench.launch import FreshProcesses
from headinfer.bench.longest import longest_context
from headinfer.bench.model_spec import NamedModel
from headinfer.bench.result import Status, TrialFailure, from_json, to_json
from headinfer.bench.rows import Percentiles, row_of
from headinfer.bench.spec import BenchSpec, Command, Fill, TrialSpec
from headinfer.bench.suite import GATE_TOKENS
from headinfer.bench.table import notes, render
from headinfer.bench.variant import REFERENCE, Variant
from shapes import LLAMA_3_8B

NO_MEMORY = TrialFailure(status=Status.CANNOT_RUN, reason="out of memory: 3 TiB")
OUT_OF_MEMORY = replace(NO_MEMORY, grows=True)
NO_LIBRARY = TrialFailure(status=Status.CANNOT_RUN, reason="a library is missing")


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
    def die(_module, _question, *, time_limit_s):
        raise child.ChildError(returncode, "Traceback\nBoom: it broke\n")

    monkeypatch.setattr(child, "ask", die)
    outcome = FreshProcesses().trial(bench_spec().trial(REFERENCE, 300), 60)
    assert isinstance(outcome, TrialFailure)
    assert outcome.status is status
    assert word in outcome.reason


def test_the_first_prefill_of_each_process_is_kept_beside_the_timed_one():
    first = iter([5.0, 9.0, 7.0, 3.0, 1.0, 2.0])
    launcher = FakeLauncher(lambda _: replace(trial_result(), first_prefill_s=next(first)))
    standard, ours = rows_of(bench_spec(repeats=3), launcher)
    assert sorted([standard.first_prefill_s, ours.first_prefill_s]) == [3.0, 5.0]
    assert standard.prefill_s == ours.prefill_s == 2.0
    (row,) = rows_of(bench_spec(methods=("standard",)), FakeLauncher(lambda _: trial_result()))
    assert row.first_prefill_s is None


def test_specs_and_outcomes_survive_json():
    spec = bench_spec().trial(Variant("headinfer", "auto"), 300)
    assert TrialSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec
    named = NamedModel(name="a", location=None, config={"b": 1}, planned=LLAMA_3_8B)
    whole = replace(bench_spec(fill=Fill.RANDOM), model=named)
    assert BenchSpec.from_json(json.loads(json.dumps(whole.to_json()))) == whole
    for outcome in (trial_result(), NO_MEMORY):
        assert from_json(json.loads(json.dumps(to_json(outcome)))) == outcome


def test_the_table_fits_100_columns_and_tells_what_did_not_run():
    def answer(spec: TrialSpec):
        big = trial_result(prefill_s=1234.5, decode_s=(1.2605,), kv_host_bytes=2**38)
        return big if spec.method == "standard" else NO_MEMORY

    spec = bench_spec(contexts=(2**20,), dtype="bfloat16")
    launcher = FakeLauncher(lambda s: answer(s) if s.context_tokens > 5000 else trial_result())
    rows = rows_of(spec, launcher)
    sizes = {"peak_rss_growth_bytes": 123 * 2**20, "kv_bytes": 1010 * 2**20}
    rows[0] = replace(rows[0], decode_x_standard=123.4, **sizes)
    console = Console(width=100, file=io.StringIO())
    console.print(render(spec, MACHINE, rows))
    text = console.file.getvalue()
    assert all(len(line.rstrip()) <= 100 for line in text.splitlines())
    for part in (
        "1234",
        "1260",
        "123.4",
        "123M",
        "1010M",
        "1M",
        "headinfer: cannot run: out of memory",
    ):
        assert part in text


@pytest.mark.covering
@pytest.mark.parametrize("width", [60, 80, 100])
@pytest.mark.parametrize("command", [each.value for each in Command])
def test_a_narrow_table_comes_in_parts_and_cuts_no_figure(command: str, width: int):
    measured = trial_result(prefill_s=1234.5, decode_s=(1.2605,), kv_host_bytes=2**38)
    methods = ("standard", "transformers-offloaded")
    spec = bench_spec(contexts=(2**20,), methods=methods, command=Command(command))
    rows = [row_of(spec, Variant(name), 2**20, [measured], MACHINE.rates, None) for name in methods]

    def figures(columns: int) -> list[str]:
        console = Console(width=columns, file=io.StringIO())
        console.print(render(spec, MACHINE, rows))
        lines = console.file.getvalue().splitlines()
        assert all(len(line) <= columns for line in lines)
        found = [line.split() for line in lines if line.startswith(" transformers-offloaded")]
        assert all(cells[:2] == found[0][:2] for cells in found), "each part has its context"
        return [*found[0][:2], *(cell for cells in found for cell in cells[2:])]

    assert figures(width) == figures(200)


def test_no_longer_context_is_tried_where_memory_ran_out():
    def answer(spec: TrialSpec):
        lacks = spec.method == "standard" and spec.context_tokens >= 20_000
        return OUT_OF_MEMORY if lacks else trial_result()

    launcher = FakeLauncher(answer)
    rows = rows_of(bench_spec(contexts=(10_000, 20_000, 40_000)), launcher)
    assert launcher.asked.count(("standard", 40_000)) == 0
    standard = [row for row in rows if row.method == "standard"]
    assert [row.status for row in standard] == [Status.OK, Status.CANNOT_RUN, Status.CANNOT_RUN]
    assert standard[2].reason == f"already at 20,000: {OUT_OF_MEMORY.reason}"
    assert all(row.status is Status.OK for row in rows if row.method == "headinfer")


def test_an_approximate_method_tells_how_far_it_is_off():
    def answer(spec: TrialSpec):
        return trial_result(logits=(3.0, 4.0) if spec.method == "standard" else (3.0, 4.5))

    rows = rows_of(bench_spec(methods=("standard", "kv-4bit")), FakeLauncher(answer))
    assert rows[1].status is Status.OK
    assert not rows[1].exact
    assert "not exact: logits are off by 0.1 " in rows[1].note


def test_a_cache_filled_at_random_does_not_spare_the_check_of_the_prefill():
    launcher = FakeLauncher(lambda spec: trial_result(prefill_s=1.0 if full(spec) else None))

    def full(spec: TrialSpec) -> bool:
        return spec.fill is Fill.PREFILL

    standard, ours = rows_of(bench_spec(fill=Fill.RANDOM), launcher)
    assert launcher.asked == [("standard", 300), ("headinfer", 300)] * 2
    assert ours.fill is Fill.RANDOM
    assert ours.prefill_s is None
    assert ours.prefill_x_standard is None
    assert ours.decode_x_standard == 1.0
    assert standard.decode_bound_s is not None


@pytest.mark.parametrize("most", [0, 500, 1024, 5000, 32768, 70_000, 2**20])
@pytest.mark.parametrize("first", [1024, 4096])
def test_the_longest_context_is_within_a_sixteenth_of_one_that_fails(most, first):
    tried = []

    def runs(tokens: int) -> bool:
        tried.append(tokens)
        return tokens <= most

    found = longest_context(runs, first=first, last=2**18)
    assert found <= most
    assert found == 0 or found in tried
    if found < 2**18:
        assert min(tokens for tokens in tried if tokens > most) - found <= max(1024, found // 16)
    assert len(tried) == len(set(tried)) <= 16


def test_the_longest_context_is_a_row_that_says_what_was_tried():
    def answer(spec: TrialSpec):
        return trial_result() if spec.context_tokens <= 3000 else OUT_OF_MEMORY

    spec = bench_spec(contexts=(1024, 2**20), command=Command.MAX_CONTEXT)
    launcher = FakeLauncher(answer)
    standard, ours = rows_of(spec, launcher)
    assert launcher.asked[:2] == [("standard", 1024), ("headinfer", 1024)]  # the check
    assert (standard.context_tokens, ours.context_tokens) == (2048, 2048)
    assert ours.status is Status.OK
    assert ours.limited_by == f"3K: cannot run: {OUT_OF_MEMORY.reason}"
    assert [tokens for tokens, _ in ours.tried] == [1024, 2048, 3072, 4096]


def test_a_method_that_runs_no_context_at_all_is_a_row():
    def answer(spec: TrialSpec):
        return NO_LIBRARY if spec.method == "headinfer" else trial_result()

    spec = bench_spec(contexts=(1024, 4096), command=Command.MAX_CONTEXT)
    standard, ours = rows_of(spec, FakeLauncher(answer))
    assert standard.context_tokens == 4096
    assert standard.limited_by == "the most that was tried, 4K"
    assert ours.status is Status.CANNOT_RUN
    assert ours.reason == NO_LIBRARY.reason


def test_the_time_left_goes_by_each_methods_own_speed():
    trials = [("slow", 1024), ("fast", 1024), ("slow", 1024), ("slow", 1024), ("fast", 1024)]
    forecast = Forecast(trials, prefills=True)
    assert forecast.left_s() is None
    forecast.finished("slow", 1024, 10.0)
    forecast.finished("fast", 1024, 1.0)
    assert forecast.left_s() == pytest.approx(21.0)
    forecast.finished("slow", 1024, 20.0)
    forecast.dropped("fast", 1024)
    assert forecast.left_s() == pytest.approx(20.0)


def test_a_trial_that_takes_too_long_is_ended():
    outcome = FreshProcesses().trial(bench_spec().trial(REFERENCE, 300), 0.01)
    assert isinstance(outcome, TrialFailure)
    assert outcome.status is Status.CANNOT_RUN
    assert "longer than 0.01 s" in outcome.reason


def test_rows_measured_beside_other_programs_are_called_noisy():
    def answer(spec: TrialSpec):
        busy = 0.3 if (spec.method, spec.context_tokens) == ("headinfer", 300) else 0.02
        return replace(trial_result(), others_cpu_share=busy)

    spec = bench_spec(contexts=(300, 600))
    rows = rows_of(spec, FakeLauncher(answer))
    assert notes(spec, rows) == ["headinfer at 300: noisy: other programs used the CPU meanwhile"]


def test_a_document_is_json_even_when_a_number_is_not():
    rows = rows_of(bench_spec(), FakeLauncher(lambda _: trial_result(logits=(float("nan"), 1.0))))
    assert rows[0].status is Status.MISMATCH
    results = Results.new(bench_spec(), MACHINE)
    results.rows = rows
    text = json.dumps(results.to_json(), allow_nan=False)
    assert json.loads(text)["rows"][0]["gate"]["logits_error"] is None


def test_a_copy_of_the_tree_is_told_its_commit(monkeypatch):
    monkeypatch.setenv("HEADINFER_COMMIT", "abc123")
    assert header(bench_spec(), MACHINE)["commit"] == {"id": "abc123", "changed": False}


def test_a_bound_counts_the_tokens_that_a_method_keeps():
    def answer(spec):
        dropping = spec.method == "h2o"
        return replace(trial_result(), plan={"kept_tokens": 75} if dropping else None)

    whole, kept = rows_of(bench_spec((300,), ("standard", "h2o")), FakeLauncher(answer))
    (short,) = rows_of(bench_spec((75,), ("standard",)), FakeLauncher(answer))
    assert kept.decode_bound_s == short.decode_bound_s < whole.decode_bound_s
    assert kept.prefill_bound_s == whole.prefill_bound_s


def test_the_bound_of_a_prefill_has_no_room_for_raw_pages_in_it():
    spec = bench_spec((300,), ("standard",), command=Command.PREFILL)
    rates = replace(MACHINE.rates, link_bytes_per_s=1.0, device_bytes_per_s=1e9)
    plain = trial_result(device="cuda", kv_host_bytes=1000)
    pooled = replace(plain, kv_host_bytes=51_000, raw_page_bytes=50_000)
    rows = [row_of(spec, REFERENCE, 300, [each], rates, None) for each in (plain, pooled)]
    assert rows[0].prefill_bound_s == rows[1].prefill_bound_s == 1000
