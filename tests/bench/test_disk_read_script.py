"""`benchmarks/disk_read.py`: what it reads, tells, leaves behind and refuses."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "disk_read.py"


def run(*words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(SCRIPT), *map(str, words)], capture_output=True, text=True, timeout=300
    )


@pytest.mark.slow
def test_both_readers_read_all_of_it_and_leave_nothing(tmp_path: Path) -> None:
    told = tmp_path / "reads.json"
    folder = tmp_path / "disk"
    folder.mkdir()
    sizes = ("--size", "48MiB", "--tile", "8MiB", "--seconds", 0, "--depths", 8, 3)
    done = run(folder, *sizes, "--json", told)
    assert done.returncode == 0, done.stderr
    document = json.loads(told.read_text())
    assert document["size_bytes"] == 48 * 2**20
    read = [(row["reader"], row["depth"]) for row in document["rows"]]
    assert read == [("cache", 8), ("plain", 8), ("plain", 3)] * 2
    for row in document["rows"]:
        assert row["read_bytes"] >= document["size_bytes"]
        assert 0 < row["least_read_bytes_per_s"] <= row["best_read_bytes_per_s"]
    assert done.stdout.count("GB/s") == 7
    assert list(folder.iterdir()) == []


@pytest.mark.covering(most=1)
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
