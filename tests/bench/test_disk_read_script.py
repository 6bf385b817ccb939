"""`benchmarks/disk_read.py`: what it reads, tells, leaves behind and refuses."""

import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "disk_read.py"


def run(*words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(SCRIPT), *map(str, words)], capture_output=True, text=True, timeout=300
    )


def test_a_disk_that_refuses_direct_reads_is_read_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = runpy.run_path(str(SCRIPT), run_name="disk_read")
    read_plainly = script["read_plainly"]
    row = read_plainly(str(tmp_path), 8 * 2**20, 0.0)
    assert row["read_bytes"] >= 8 * 2**20
    monkeypatch.setitem(read_plainly.__globals__, "_open_direct", lambda name: None)
    cached = read_plainly(str(tmp_path), 8 * 2**20, 0.0)
    assert not cached["direct"]
    assert cached["read_bytes"] >= 8 * 2**20
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_both_readers_read_all_of_it_and_leave_nothing(tmp_path: Path) -> None:
    told = tmp_path / "reads.json"
    folder = tmp_path / "disk"
    folder.mkdir()
    done = run(folder, "--size", "48MiB", "--tile", "8MiB", "--seconds", 0, "--json", told)
    assert done.returncode == 0, done.stderr
    document = json.loads(told.read_text())
    assert document["size_bytes"] == 48 * 2**20
    assert [row["reader"] for row in document["rows"]] == ["cache", "plain"]
    for row in document["rows"]:
        assert row["read_bytes"] >= document["size_bytes"]
        assert 0 < row["least_read_bytes_per_s"] <= row["best_read_bytes_per_s"]
    assert done.stdout.count("GB/s") == 3
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["/nowhere/at/all"], "is not there"),
        (["/tmp", "--tile", "3MiB"], "give a multiple of 4.00 MiB"),
    ],
    ids=["folder", "tile"],
)
def test_what_cannot_be_read_is_refused_in_a_line(words: list[str], told: str) -> None:
    done = run(*words)
    assert done.returncode == 2
    assert told in done.stderr
    assert done.stderr.count("\n") == 1
