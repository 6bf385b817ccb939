"""Benchmarks above a disk: what is read from it, its bound, and what tables say of it."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from bench_parts import MACHINE, FakeLauncher, NoProgress, bench_spec, trial_result
from typer.testing import CliRunner

from headinfer.bench import child, trial
from headinfer.bench.bound import Rates, Work, bound
from headinfer.bench.document import Results
from headinfer.bench.launch import FreshProcesses
from headinfer.bench.machine_disk import answer
from headinfer.bench.report import report
from headinfer.bench.result import TrialResult
from headinfer.bench.rows import Row
from headinfer.bench.spec import BenchSpec, TrialSpec
from headinfer.bench.suite import Suite
from headinfer.bench.table import conditions, notes
from headinfer.bench.trial import attempt
from headinfer.cli import bench
from headinfer.cli.bench_options import run_spec
from headinfer.errors import OptionError
from headinfer.plan.hardware import DiskRate
from headinfer.plan.options import Options
from headinfer.probe import disk

ABOVE = replace(
    MACHINE,
    rates=replace(MACHINE.rates, disk_read_bytes_per_s=4e9, disk_write_bytes_per_s=2e9),
    rates_by=MACHINE.rates_by | {"disk_read_bytes_per_s": "ext4, past the page cache"},
)


def spec_above(folder: Path) -> BenchSpec:
    settings = Options.parse(device="cpu", host_memory="4GiB", disk_cache=str(folder))
    return replace(bench_spec(methods=("standard", "bounded")), settings=settings)


def measured(spec: TrialSpec) -> TrialResult:
    result = trial_result(decode_s=(0.5,))
    below = 0 if spec.method == "standard" else 10**9
    return replace(result, kv_disk_bytes=below, disk_read_bytes=below)


def rows_above(
    spec: BenchSpec, answers: Callable[[TrialSpec], TrialResult] = measured
) -> list[Row]:
    return list(Suite(spec, FakeLauncher(answers), ABOVE.rates, NoProgress()).run())


def test_what_is_read_from_the_disk_bounds_a_step() -> None:
    work = Work(host_bytes=1e9, disk_read_bytes=1e9, disk_written_bytes=1e8)
    rates = Rates(host_bytes_per_s=25e9, matmul_flops_per_s=1e12)
    assert bound(work, rates).limited_by == "host memory"  # where there is no disk
    above = replace(rates, disk_read_bytes_per_s=4e9, disk_write_bytes_per_s=2e9)
    assert bound(work, above).limited_by == "disk"
    assert bound(work, above).seconds == pytest.approx(0.25)
    written = replace(work, disk_written_bytes=1e9)
    assert bound(written, above).limited_by == "disk, written"


def test_rows_say_what_the_disk_takes_at_least(tmp_path: Path) -> None:
    spec = spec_above(tmp_path)
    standard, bounded = rows_above(spec)
    assert (bounded.bound_by, bounded.bound_fraction) == ("disk", pytest.approx(0.5))
    assert (bounded.kv_disk_bytes, bounded.disk_read_bytes) == (10**9, 10**9)
    assert bounded.disk_bound_s == pytest.approx(0.25)
    assert standard.disk_read_bytes == 0
    told = "bounded: a step reads 953.67 MiB from the disk, which takes 250 ms at least"
    assert told in notes(spec, [standard, bounded])
    said = list(conditions(spec, ABOVE))
    assert "disk: read 4.00 GB/s, written 2.00 GB/s (ext4, past the page cache)" in said
    assert "CPU memory for KV held to 4GiB" in said
    results = Results.new(spec, ABOVE)
    results.rows = [standard, bounded]
    results.save(str(tmp_path / "gpu-disk.json"))
    again = Results.load(str(tmp_path / "gpu-disk.json"))
    assert again.arranged_rows[1].disk_bound_s == bounded.disk_bound_s
    written = report([("gpu-disk", again)], "plots")
    assert f"- {told}" in written
    assert "- disk: read 4.00 GB/s" in written
    without = Suite(spec, FakeLauncher(measured), MACHINE.rates, NoProgress())
    assert next(iter(without.run())).disk_read_bytes is None


def test_the_fastest_that_a_disk_was_seen_to_read_is_the_bound(tmp_path: Path) -> None:
    def behind(per_s: float) -> Row:
        rows = rows_above(
            spec_above(tmp_path),
            lambda bounded: replace(measured(bounded), disk_read_bytes_per_s=per_s),
        )
        return rows[1]

    assert behind(1e9).disk_bound_s == pytest.approx(0.25)
    assert behind(8e9).disk_bound_s == pytest.approx(0.125)
    assert behind(8e9).bound_fraction == pytest.approx(0.25)


def test_no_step_is_faster_than_its_bound(tmp_path: Path) -> None:
    rows = rows_above(
        spec_above(tmp_path), lambda spec: replace(measured(spec), decode_s=(0.3, 0.2, 0.25))
    )
    assert rows[1].disk_bound_s == pytest.approx(0.2)
    assert rows[1].bound_fraction == pytest.approx(0.8)


def test_a_trial_tells_what_its_steps_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rate = DiskRate(
        disk="",
        date="",
        direct=True,
        read_bytes_per_s=6e9,
        best_read_bytes_per_s=7e9,
        write_bytes_per_s=1e9,
    )
    monkeypatch.setattr(trial, "measure_disk", lambda folder, quick: rate)
    spec = spec_above(tmp_path)
    settings = Options.parse(
        device="simulated",
        tile_tokens="64",
        chunk_tokens="64",
        host_memory="640KiB",
        disk_cache=str(tmp_path),
    )
    bounded = replace(spec, settings=settings, new_tokens=1).trial(spec.variants[1], 1024)
    result = attempt(bounded)
    assert isinstance(result, TrialResult), result
    assert result.kv_disk_bytes > result.disk_read_bytes > 0  # a new block is not sent home yet
    assert result.kv_host_bytes <= 640 * 2**10
    assert result.streamed_kv_bytes >= result.disk_read_bytes
    assert result.disk_read_bytes_per_s == 7e9


def test_a_disk_that_cannot_be_measured_is_refused_in_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(disk, "free_bytes", lambda folder: 0)
    monkeypatch.setattr(child, "ask", lambda module, question: answer(question))
    with pytest.raises(OptionError, match="free space"):
        FreshProcesses().above_disk(MACHINE, str(tmp_path))
    monkeypatch.setattr(disk, "free_bytes", lambda folder: 2**26)
    found = FreshProcesses().above_disk(MACHINE, str(tmp_path))
    assert found.rates.disk_read_bytes_per_s
    assert found.rates.host_bytes_per_s == MACHINE.rates.host_bytes_per_s


def test_the_verb_takes_the_folder_and_checks_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    found: list[BenchSpec] = []
    monkeypatch.setattr(
        bench, "_run", lambda command, given: found.append(run_spec(command, given))
    )
    flags = ["decode", "--host-memory", "4GiB", "--disk-cache"]
    assert CliRunner().invoke(bench.app, [*flags, str(tmp_path)]).exit_code == 0
    (spec,) = found
    assert spec.settings.disk_cache == str(tmp_path)
    assert spec.trial(spec.variants[0], 1024).settings.host_memory_bytes == 4 * 2**30
    assert BenchSpec.from_json(spec.to_json()).settings.disk_cache == str(tmp_path)
    assert CliRunner().invoke(bench.app, [*flags, str(tmp_path / "none")]).exit_code == 2
