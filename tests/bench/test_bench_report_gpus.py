"""What the report says of several GPUs, from results made by hand."""

from collections.abc import Mapping
from dataclasses import replace

import pytest
from bench_parts import MACHINE, bench_spec, trial_result

from headinfer.bench.bound import Rates
from headinfer.bench.document import Results
from headinfer.bench.gate import Verdict
from headinfer.bench.held import HeldPart
from headinfer.bench.model_spec import NamedModel
from headinfer.bench.report import report
from headinfer.bench.report_gpus import targets_table, times_table
from headinfer.bench.report_plots import figures
from headinfer.bench.result import Status
from headinfer.bench.rows import row_of
from headinfer.bench.spec import Command
from headinfer.bench.variant import variant_of
from headinfer.estimate.presets import preset_shape

K = 1024
CARDS = replace(
    MACHINE,
    device="cuda",
    hardware={"cpu": "a processor", "gpu": "a card", "torch_threads": 2},
    rates=Rates(
        host_bytes_per_s=1e11,
        matmul_flops_per_s=1e14,
        device_bytes_per_s=1e12,
        link_bytes_per_s=50e9,
        links_bytes_per_s=100e9,
    ),
)
RIGHT = Verdict(
    passed=True,
    reason="",
    context_tokens=K,
    logits_error=0.0,
    logits_tolerance=1.0,
    equal_tokens=1,
    tokens=1,
)


def part(streamed_bytes: int) -> HeldPart:
    return HeldPart(
        layers=16,
        kv_bytes=10**9,
        streamed_bytes=streamed_bytes,
        host_attended_bytes=0,
        resident_tokens=1,
    )


def results_of(
    seconds: Mapping[tuple[str, int], float],
    *,
    command: Command = Command.DECODE,
    model: str = "llama-3-8b",
    streamed_bytes: int = 25 * 10**9,
) -> Results:
    """Return results with these seconds for each method and context."""
    methods = tuple(dict.fromkeys(method for method, _ in seconds))
    contexts = tuple(sorted({context for _, context in seconds}))
    spec = replace(
        bench_spec(dtype="bfloat16", command=command),
        methods=methods,
        contexts=contexts,
        gpus=2,
        model=NamedModel(name=model, location=None, config=None, planned=preset_shape(model)),
    )
    results = Results.new(spec, CARDS)
    for (method, context), each in seconds.items():
        trial = replace(
            trial_result(prefill_s=each, decode_s=(each,), device="cuda"),
            parts=() if method.startswith("one") else (part(streamed_bytes),) * 2,
        )
        results.rows.append(
            row_of(spec, variant_of(method, "auto"), context, [trial], CARDS.rates, RIGHT)
        )
    return results


def found(text: str, method: str, context: str, over: str) -> str:
    """Return what a table of targets says was measured."""
    cells = [line.strip("| ").split(" | ") for line in text.splitlines()]
    for what, where, of, *_, measured in (each for each in cells if len(each) == 5):
        if what.startswith(f"`{method}`") and where.endswith(f", {context}") and over in of:
            return measured
    raise AssertionError(f"no line for {method} at {context}")


def test_what_was_not_measured_is_said():
    text = targets_table([])
    assert text.count("not measured") == 10
    assert "reached" not in text


@pytest.mark.parametrize(
    ("heads_s", "words"), [(0.45, "0.45, reached"), (0.5, "0.50, not reached")]
)
def test_heads_are_held_against_one_gpu(heads_s, words):
    results = results_of({("one", 400 * K): 1.0, ("heads", 400 * K): heads_s})
    assert found(targets_table([results]), "heads", "400K", "`one`") == words
    assert found(targets_table([results]), "heads", "800K", "`one`") == "not measured"
    assert found(targets_table([results]), "heads-host", "400K", "one-host") == "not measured"


def test_layers_are_held_against_what_both_gpus_fetch():
    seconds = {("layers", 400 * K): 1.05, ("layers", 800 * K): 2.0}
    text = targets_table([results_of(seconds)])  # 50 GB, at 50 GB/s
    assert found(text, "layers", "400K", "one link") == "1.05, reached"
    assert found(text, "layers", "800K", "one link") == "2.00, not reached"
    none = targets_table([results_of(seconds, streamed_bytes=0)])
    assert found(none, "layers", "400K", "one link") == "not measured"


def test_a_large_model_is_held_against_its_own_bound():
    results = results_of({("heads", 100 * K): 0.575}, model="llama-3-70b")  # 25 GB by each link
    assert found(targets_table([results]), "heads", "100K", "bound") == "1.15, reached"
    assert found(targets_table([results]), "layers", "100K", "bound") == "not measured"


def test_prefills_are_held_against_those_of_one_gpu():
    seconds = {("one", 100 * K): 10.0, ("layers", 100 * K): 7.0, ("heads", 100 * K): 5.0}
    text = targets_table([results_of(seconds, command=Command.PREFILL)])
    assert found(text, "layers", "100K", "`one`") == "0.70, not reached"
    assert found(text, "heads", "100K", "`one`") == "0.50, reached"


@pytest.mark.slow
def test_what_each_gpu_worked_of_a_prefill_is_told_where_it_was_measured(tmp_path):
    results = results_of({("layers", 100 * K): 7.0, ("heads", 100 * K): 5.0})
    assert "worked" not in report([("gpu2", results)], "plots")
    layers, heads = results.rows
    worked = [
        replace(each, prefill_busy=busy)
        for each, busy in zip(layers.parts, (0.91, 0.874), strict=True)
    ]
    results.rows[:] = [replace(layers, parts=tuple(worked)), heads]
    told = report([("gpu2", results)], "plots")
    assert "- layers: the GPUs worked 91%, 87% of the prefill\n" in told
    results.save(str(tmp_path / "results.json"))
    read = Results.load(str(tmp_path / "results.json"))
    assert [part.prefill_busy for part in read.rows[0].parts] == [0.91, 0.874]


def test_a_wrong_result_reaches_nothing():
    results = results_of({("one", 400 * K): 1.0, ("heads", 400 * K): 0.1})
    results.rows[1] = replace(results.rows[1], status=Status.MISMATCH)
    assert found(targets_table([results]), "heads", "400K", "`one`") == "not measured"


def test_the_report_has_a_section_of_several_gpus_and_nothing_of_them_elsewhere():
    results = results_of({("one", 400 * K): 1.0, ("heads", 400 * K): 0.625})
    text = report([("gpu2-8b", results)], "plots")
    before, section = text.split("## Several GPUs")
    assert "2 x a card" not in before
    assert "2 x a card" in section
    assert "all links at once 100.0 GB/s" in section
    assert "| 400K | 1 s (" in section
    assert "625 ms (80%)" in section  # 25 GB by each link, at 50 GB/s
    assert "0.62, not reached" in section
    assert "plots/gpu2-8b" not in text
    assert not list(figures("gpu2-8b", results))


@pytest.mark.parametrize("newest_first", [False, True])
def test_the_newest_of_several_files_counts(newest_first):
    files = [
        results_of({("one", 400 * K): 1.0, ("heads", 400 * K): heads_s}) for heads_s in (0.5, 0.25)
    ]
    for results, day in zip(files, ("01", "02"), strict=True):
        results.header["date"] = f"2026-01-{day}T00:00:00+00:00"
    text = targets_table(files[::-1] if newest_first else files)
    assert found(text, "heads", "400K", "`one`") == "0.25, reached"


def test_only_what_ran_is_a_column():
    results = results_of({("one", 400 * K): 1.0, ("heads", 800 * K): 0.5})
    head, _, *lines = times_table(results).splitlines()
    assert head == "| context | one | heads |"
    assert [line.count(" - ") for line in lines] == [1, 1]


@pytest.mark.parametrize("newest_first", [False, True])
def test_runs_of_a_title_are_one_table_whose_lines_are_of_one_run_each(newest_first):
    runs = [
        results_of({("one", 800 * K): 2.0, ("heads", 800 * K): 0.5}),
        results_of({("one", 400 * K): 9.0, ("heads", 400 * K): 1.0}),
        results_of({("one", 400 * K): 3.0, ("layers", 400 * K): 2.0}),
    ]
    for results, day in zip(runs, ("01", "02", "03"), strict=True):
        results.header["date"] = f"2026-01-{day}T00:00:00+00:00"
    head, _, *lines = times_table(*(runs[::-1] if newest_first else runs)).splitlines()
    assert head == "| context | one | heads | layers |"
    cells = [[cell.split(" (")[0] for cell in line.strip("| ").split(" | ")] for line in lines]
    assert cells == [
        ["400K", "3 s", "-", "2 s"],
        ["400K", "-", "1 s", "-"],  # and not what the newer run measured again
        ["800K", "2 s", "500 ms", "-"],
    ]
