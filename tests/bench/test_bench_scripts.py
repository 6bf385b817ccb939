"""The scripts for GPUs: each command they would run is one that the command line takes."""

import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from headinfer.bench.spec import BenchSpec
from headinfer.cli import bench
from headinfer.cli.bench_options import run_spec

ROOT = Path(__file__).parents[2]
SCRIPTS = ROOT / "benchmarks"


def script(name: str, *parts: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(SCRIPTS / name), *parts],
        capture_output=True,
        text=True,
        timeout=120,
        env={
            **os.environ,
            "PYTHON": sys.executable,
            "DRY": "1",
            "HARDWARE": "h100-80gb",
            **environment,
        },
    )


def parts_of(name: str, **environment: str) -> list[str]:
    listed = script(name, **environment)
    assert listed.returncode == 2
    return listed.stdout.partition("the parts are: ")[2].split()


@pytest.fixture
def specs(monkeypatch: pytest.MonkeyPatch) -> list[BenchSpec]:
    """Return what the benchmarks are asked for, in place of running them."""
    found: list[BenchSpec] = []

    def keep(command: Any, given: dict[str, Any]) -> None:
        found.append(run_spec(command, given))

    monkeypatch.setattr(bench, "_run", keep)
    return found


def asked(
    specs: list[BenchSpec], name: str, gpus: str, folder: Path, *parts: str
) -> dict[str, BenchSpec]:
    """Return what some parts of a script ask the benchmarks for, by part."""
    done = script(name, *parts, GPUS=gpus, FOLDER=str(folder), SUFFIX="-once")
    assert done.returncode == 0, done.stderr
    lines = [shlex.split(line) for line in done.stdout.splitlines()]
    assert len(lines) == len(parts)
    runs = {part: words for part, words in zip(parts, lines, strict=True) if "bench" in words}
    for words in runs.values():
        assert words[-1].startswith(f"{folder}/gpu{gpus}-")
        assert words[-1].endswith("-once.json")
        result = CliRunner().invoke(bench.app, words[words.index("bench") + 1 :])
        assert result.exit_code == 0, result.output
    assert {spec.gpus for spec in specs} <= {int(gpus)}
    return dict(zip(runs, specs, strict=True))


@pytest.mark.covering(most=1)
@pytest.mark.parametrize(("name", "gpus"), [("gpu2.sh", "2"), ("gpu8.sh", "8"), ("gpu8.sh", "1")])
def test_each_part_asks_for_what_there_is(
    specs: list[BenchSpec], name: str, gpus: str, tmp_path: Path
) -> None:
    parts = parts_of(name, GPUS=gpus)
    found = asked(specs, name, gpus, tmp_path, *parts)
    assert found.keys() == set(parts) - {"plan", "70b-4bit"}
    if gpus == "2":
        assert found["70b-decode-longest"].methods == ("layers", "heads")
        (longest,) = found["70b-decode-longest"].contexts
        assert 2**20 < longest < 2**21  # by the plan for 512 GiB of CPU memory
    if gpus != "8":
        return
    settings = {part: spec.settings for part, spec in found.items()}
    assert {each.device_memory_bytes for each in settings.values()} == {24 * 2**30}
    assert settings["70b-decode-400K"].chunk_tokens == settings["70b-longest-10K"].chunk_tokens
    assert settings["70b-longest-10K"].chunk_tokens == 10240
    assert settings["70b-longest-5K"].chunk_tokens == 5120
    assert found["70b-decode-400K"].methods == ("layers", "heads")
    first, last = found["70b-longest-10K"].contexts
    assert found["70b-decode-longest"].contexts == (first,)
    # What CPU memory holds by the plan, and a sixteenth more, which it may not.
    assert 2**20 < first < last == first * 17 // 16
    assert found["8b-4M"].contexts == (2**22,)


def test_four_gpus_give_twice_as_much(specs: list[BenchSpec], tmp_path: Path) -> None:
    found = asked(specs, "gpu8.sh", "4", tmp_path, "70b-decode-400K", "8b-2M")
    assert found["70b-decode-400K"].settings.device_memory_bytes == 48 * 2**30
    assert found["8b-2M"].settings.device_memory_bytes == 24 * 2**30


def test_other_parts_and_numbers_are_refused_in_a_line() -> None:
    other = script("gpu8.sh", "70b-nothing")
    assert other.returncode == 2
    assert "there is no part 70b-nothing; the parts are: plan 70b-decode-10K" in other.stderr
    assert "GPUS is 8, 4 or 1, not 3" in script("gpu8.sh", GPUS="3").stderr


def test_each_result_of_one_gpu_is_asked_for_as_the_command_line_takes_it(
    specs: list[BenchSpec], tmp_path: Path
) -> None:
    done = script("gpu.sh", OUT=str(tmp_path))
    assert done.returncode == 0, done.stderr
    lines = [shlex.split(line) for line in done.stdout.splitlines()]
    for words in lines:
        result = CliRunner().invoke(bench.app, words[words.index("bench") + 1 :])
        assert result.exit_code == 0, (words, result.output)
    files = [Path(words[-1]).name for words in lines]
    assert len(set(files)) == len(files) == len(specs) > 20
    once = script("gpu.sh", "first-token", "packed-1M", OUT=str(tmp_path))
    asked_for = [Path(line.split()[-1]).name for line in once.stdout.splitlines()]
    assert asked_for == ["gpu-packed-1M.json", "gpu-first-token.json"]
    other = script("gpu.sh", "first-tokens", OUT=str(tmp_path))
    assert other.returncode == 2
    assert other.stderr.startswith(
        "there is no part first-tokens; the parts are: tests kernels trace"
    )
    assert not other.stdout


@pytest.mark.parametrize(
    ("name", "part", "options"),
    [("gpu.sh", "first-token-1K", "--quick --disk {0} "), ("gpu2.sh", "8b-prefill", "--quick ")],
    ids=["one GPU", "several"],
)
def test_a_machine_is_probed_once(tmp_path: Path, name: str, part: str, options: str) -> None:
    """A stand-in for Python notes what it is asked, and fails at the first probe."""
    log, python = tmp_path / "log", tmp_path / "python"
    python.write_text(f'#!/bin/sh\necho "$*" >> {log}\n[ "$(grep -c probe {log})" != 1 ]\n')
    python.chmod(0o755)
    folder = tmp_path / "results"
    folders = {key: str(folder) for key in ("OUT", "FOLDER")}
    for _ in range(3):
        script(
            *(name, part),
            **folders,
            **{"PYTHON": str(python), "DRY": "", "TMPDIR": str(tmp_path), "DISK": str(tmp_path)},
        )
    asked_for = log.read_text().splitlines()
    probes = [line.partition(" probe ")[2] for line in asked_for if " probe " in line]
    assert len(probes) == 2  # the second one is well
    assert probes[0].startswith(options.format(tmp_path))
    assert probes[1].startswith("--quick --json ")
    assert sum(" bench prefill " in line for line in asked_for) == 3
