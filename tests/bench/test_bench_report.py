"""The report, from results made by hand: what is in it, and where each figure comes from."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
from bench_parts import MACHINE, bench_spec, trial_result
from typer.testing import CliRunner

from headinfer.bench.bound import Rates
from headinfer.bench.catalogue import CATALOGUE
from headinfer.bench.document import Results
from headinfer.bench.model_spec import NamedModel
from headinfer.bench.report import report
from headinfer.bench.result import Status
from headinfer.bench.rows import row_of, row_without_result
from headinfer.bench.spec import BenchSpec, Command
from headinfer.bench.variant import variant_of
from headinfer.cli import bench
from headinfer.errors import OptionError
from headinfer.estimate.presets import preset_shape
from headinfer.plan.options import Options

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
GPU = replace(
    MACHINE,
    device="cuda",
    hardware={"cpu": "a processor", "gpu": "a card", "torch_threads": 2},
    rates=Rates(
        host_bytes_per_s=1e11,
        matmul_flops_per_s=1e14,
        device_bytes_per_s=1e12,
        link_bytes_per_s=25e9,
    ),
)
LLAMA = NamedModel(
    name="llama-3-8b", location=None, config=None, planned=preset_shape("llama-3-8b")
)


def results_of(spec: BenchSpec, machine=MACHINE, missing=()) -> Results:
    """Return a row for each method and context; half a second a thousand tokens in decode."""
    results = Results.new(spec, machine)
    for context in spec.contexts:
        for method in spec.methods:
            if (method, context) in missing:
                reason = "out of memory: 3 TiB"
                row = row_without_result(
                    spec, variant_of(method, "auto"), context, Status.CANNOT_RUN, reason
                )
            else:
                step_s = context / 2048
                trial = trial_result(
                    prefill_s=10 * step_s, decode_s=(step_s,), device=machine.device
                )
                row = row_of(
                    spec, variant_of(method, "auto"), context, [trial], machine.rates, None
                )
            results.rows.append(row)
    return results


def line_of(text: str, start: str, after: str = "") -> list[str]:
    rest = text[text.index(after) :]
    line = next(line for line in rest.splitlines() if line.startswith(start))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_a_table_has_contexts_down_and_methods_across_and_reasons_below():
    spec = bench_spec(contexts=(1024, 4096))
    text = report([("cpu-decode", results_of(spec, missing=[("standard", 4096)]))], "plots")
    assert line_of(text, "| context") == ["context", "standard", "headinfer", "least possible"]
    assert line_of(text, "| 1K")[1:3] == ["500 ms", "500 ms"]
    assert line_of(text, "| 4K")[1:3] == ["-", "2 s"]
    assert "- standard at 4K: cannot run: out of memory: 3 TiB" in text
    assert "](plots/cpu-decode.png)" in text


def test_runs_of_one_machine_have_titles_of_their_own_and_short_contexts_first():
    held = Options.parse(device_memory="4GiB")
    files = [
        ("b", results_of(bench_spec(contexts=(102400, 204800)))),
        ("a", results_of(bench_spec(contexts=(1024, 4096)))),
        ("c", results_of(replace(bench_spec(contexts=(1024,)), settings=held))),
    ]
    headings = [line for line in report(files, "plots").splitlines() if line.startswith("###")]
    assert headings[:3] == [
        "### Decode at 1K to 4K tokens",
        "### Decode at 1K tokens in 4GiB",
        "### Decode at 100K to 200K tokens",
    ]


def test_a_run_about_memory_tells_its_prefill_too():
    spec = bench_spec(contexts=(1024,), command=Command.MEMORY)
    text = report([("cpu-memory", results_of(spec))], "plots")
    assert line_of(text, "| 1K", after="### Prefill at")[1:3] == ["5 s", "5 s"]
    assert "](plots/cpu-memory.png)" in text
    assert "](plots/cpu-memory-prefill.png)" in text


@pytest.mark.parametrize(
    "method", [name for name, info in CATALOGUE.items() if not info.needs_several]
)
def test_every_method_can_be_plotted(method):
    pytest.importorskip("matplotlib")
    from headinfer.bench.report_plots import figures

    spec = bench_spec(methods=(method,), contexts=(1024, 4096))
    (name, figure), *_ = figures("cpu-decode", results_of(spec))
    assert name == "cpu-decode.png"
    assert method in [text.get_text() for text in figure.axes[0].texts]


@pytest.mark.slow
def test_what_a_stopped_run_did_not_get_to_is_said():
    spec = bench_spec(methods=("standard", "headinfer"), contexts=(1024, 2048))
    results = results_of(spec)
    assert "not measured, the run was stopped" not in report([("decode", results)], "plots")
    del results.rows[-1]
    text = report([("decode", results)], "plots")
    assert "- headinfer at 2K: not measured, the run was stopped before\n" in text


@pytest.mark.slow
def test_the_papers_table_4_is_empty_until_a_70b_was_measured_in_its_chunks():
    large = NamedModel(
        name="llama-3-70b", location=None, config=None, planned=preset_shape("llama-3-70b")
    )
    spec = replace(
        bench_spec(
            contexts=(800 * 1024,),
            methods=("head-wise-1",),
            command=Command.MAX_CONTEXT,
            dtype="bfloat16",
        ),
        model=large,
        settings=Options.parse(device_memory="24GiB", chunk_tokens="10K"),
    )
    nothing = report([], "plots")
    some = report([("gpu-longest", results_of(spec, GPU))], "plots")
    for text, measured in ((nothing, "-"), (some, "800")):
        rows = [line_of(text, f"| {name}", after="### Table 4") for name in ("standard", "head")]
        assert rows[0][1].startswith("10 / - / 11.4")
        assert rows[1][0] == "head-wise-1, 10K chunks"
        assert rows[1][1].startswith(f"950 / {measured} / ")
        assert line_of(text, "| head-wise-1, 5K", "### Table 4")[1].startswith("1000 / - / ")


def test_the_papers_tables_hold_what_was_measured_of_its_model_on_a_gpu():
    spec = replace(
        bench_spec(contexts=(1024, 10240), methods=("standard", "head-wise-1"), dtype="bfloat16"),
        model=LLAMA,
        settings=Options.parse(device_memory="24GiB"),
    )
    text = report([("gpu-decode", results_of(spec, GPU))], "plots")
    assert "Measured on a card held to 24GiB." in text
    row = line_of(text, "| 10K", after="### Table 7")
    assert row[1].startswith("0.03 / 5 / 0.016")  # standard
    assert row[2].startswith("0.09 / - / ")  # layer-wise: not measured
    assert row[6].startswith("0.14 / 5 / ")  # head-wise-1
    assert line_of(text, "| 10K", after="### Table 6")[1].startswith("1.23 / - / ")


def test_the_longest_contexts_are_a_table_and_stand_in_the_papers_tables():
    spec = replace(
        bench_spec(
            contexts=(1024, 2**20),
            methods=("head-wise-2", "kv-4bit"),
            command=Command.MAX_CONTEXT,
            dtype="bfloat16",
        ),
        model=LLAMA,
    )
    results = Results.new(spec, GPU)
    trial = trial_result(device="cuda")
    row = row_of(spec, variant_of("head-wise-2", "auto"), 524288, [trial], GPU.rates, None)
    results.rows = [
        replace(row, limited_by="600K: out of memory"),
        row_without_result(spec, variant_of("kv-4bit", "auto"), 0, Status.CANNOT_RUN, "no library"),
    ]
    text = report([("gpu-longest", results)], "plots")
    assert line_of(text, "| head-wise-2") == ["head-wise-2", "512K", "600K: out of memory"]
    assert line_of(text, "| kv-4bit") == ["kv-4bit", "-", "no library"]
    assert line_of(text, "| head-wise-2", after="### Table 5")[1].startswith("2100 / 512 / 2144")
    assert "plots/" not in text


def test_a_cpus_results_are_not_taken_for_the_papers():
    spec = replace(bench_spec(contexts=(1024,), dtype="bfloat16"), model=LLAMA)
    text = report([("cpu-decode", results_of(spec))], "plots")
    assert "Nothing is measured here yet" in text
    assert line_of(text, "| 1K", after="### Table 7")[1].startswith("0.03 / - / ")


def test_the_verb_writes_document_and_plots(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "docs").mkdir()
    results_of(bench_spec(contexts=(1024, 4096))).save("cpu-decode.json")
    results_of(bench_spec(contexts=(1024,), command=Command.MEMORY)).save("cpu-memory.json")
    result = CliRunner().invoke(bench.app, ["report", "cpu-decode.json", "cpu-memory.json"])
    assert result.exit_code == 0, result.stderr
    text = (tmp_path / "docs" / "benchmarks.md").read_text()
    assert text.count("![") == 3
    for name in ("cpu-decode.png", "cpu-memory.png", "cpu-memory-prefill.png"):
        assert f"](plots/{name})" in text
        size = (tmp_path / "docs" / "plots" / name).stat().st_size
        assert 0 < size < 200_000


def test_files_that_hold_no_results_are_refused(tmp_path):
    path = tmp_path / "bad.json"
    results_of(bench_spec(contexts=(1024,))).save(str(path))
    values = json.loads(path.read_text())
    damaged = [
        path.read_text()[:-100],
        json.dumps(values | {"checks": []}),
        json.dumps(values | {"rows": [1]}),
        json.dumps(values | {"header": values["header"] | {"spec": []}}),
        "[" * 100_000,
        "\xff",
    ]
    for content in ("", "[]", "{}", '{"header": {"format": 1}}', *damaged):
        path.write_bytes(content.encode("latin-1"))
        with pytest.raises(OptionError, match=r"bad\.json"):
            Results.load(str(path))


def test_results_that_cannot_be_written_leave_the_old_ones(tmp_path, monkeypatch):
    path = tmp_path / "out.json"
    results = results_of(bench_spec(contexts=(1024,)))
    results.save(str(path))
    before = path.read_text()

    def fail(*_paths):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("headinfer.bench.document.os.replace", fail)
    with pytest.raises(OptionError, match="No space left on device"):
        results.save(str(path))
    assert path.read_text() == before
    assert list(tmp_path.iterdir()) == [path]


def test_results_are_written_beside_no_other_file(tmp_path):
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "out.json").symlink_to("results.json")
    (tmp_path / "out.json.new").symlink_to("mine")
    (tmp_path / "results.json.new").write_text("mine too")
    before = sorted(os.listdir(tmp_path))
    for _ in range(2):
        results_of(bench_spec(contexts=(1024,))).save(str(tmp_path / "out.json"))
    assert (tmp_path / "mine").read_text() == "mine"
    assert (tmp_path / "results.json.new").read_text() == "mine too"
    assert (tmp_path / "out.json").is_symlink()
    assert len(Results.load(str(tmp_path / "results.json")).rows) == 2
    assert sorted(os.listdir(tmp_path)) == sorted([*before, "results.json"])


def test_results_survive_their_file(tmp_path):
    results = results_of(bench_spec(contexts=(1024, 4096)), missing=[("standard", 4096)])
    path = str(tmp_path / "out.json")
    results.save(path)
    loaded = Results.load(path)
    assert loaded.to_json() == results.to_json()
    assert loaded.spec == results.spec
    assert loaded.rows == results.arranged_rows


def test_the_repositorys_report_is_generated():
    alone = ("gpu-captured", "gpu-1M", "gpu-disk", "gpu-packed", "gpu-packed-1M")
    alone += (
        "gpu-packed-prefill",
        "gpu-packed-resident",
        "gpu-packed-resident-800K",
        "gpu-answers",
    )
    others = [RESULTS / f"{name}.json" for name in alone]
    for name in ("sparse", "longest", "drafts", "first-token"):
        others += RESULTS.glob(f"gpu-{name}*.json")
    others += RESULTS.glob("gpu[248]-*.json")
    paths = sorted([*RESULTS.glob("*-suite-*.json"), *others])
    files = [(path.stem, Results.load(str(path))) for path in paths]
    document = RESULTS.parents[1] / "docs" / "benchmarks.md"
    assert report(files, "plots") == document.read_text(), "run `headinfer bench report` again"
    assert all(json.loads(path.read_text())["rows"] for path in paths)
