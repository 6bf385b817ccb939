"""`headinfer probe --disk`: what it finds, what it leaves behind, and what it refuses."""

import json
from pathlib import Path

import pytest

from headinfer.disk.file import DEPTH, PART_BYTES, SpillFile
from headinfer.disk.mount import Mount, mount_of
from headinfer.errors import OptionError
from headinfer.plan import measured
from headinfer.probe import disk
from headinfer.probe import run as probe_run
from measurements import CPU_ONLY, measured_here


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(disk, "_QUICK_BYTES", 2 * PART_BYTES)
    monkeypatch.setattr(probe_run, "run_probe", lambda *_: measured_here(CPU_ONLY))


def test_all_that_is_written_is_read_in_the_engines_sizes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    moved: dict[str, list[tuple[int, int]]] = {"write": [], "read": []}
    for way, seen in moved.items():
        move = getattr(SpillFile, way)

        def note(self, offset, memory, move=move, seen=seen):
            seen.append((offset, memory.nbytes))
            return move(self, offset, memory)

        monkeypatch.setattr(SpillFile, way, note)
    rate = disk.measure_disk(str(tmp_path), quick=True)
    places = [(number * PART_BYTES, PART_BYTES) for number in range(16)]
    assert moved == {"write": places, "read": places}
    assert 0 < rate.read_bytes_per_s <= rate.best_read_bytes_per_s
    assert rate.write_bytes_per_s > 0
    assert rate.disk == mount_of(str(tmp_path)).disk
    assert list(tmp_path.iterdir()) == []


def test_it_takes_no_more_than_half_of_the_free_space(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    least = 2 * 8 * PART_BYTES
    monkeypatch.setattr(disk, "free_bytes", lambda folder: least)
    assert disk.measure_disk(str(tmp_path), quick=True).read_bytes_per_s > 0
    monkeypatch.setattr(disk, "free_bytes", lambda folder: least - 1)
    with pytest.raises(OptionError, match=r"measuring it takes 64.00 MiB; free space"):
        disk.measure_disk(str(tmp_path), quick=True)


def test_a_probe_keeps_the_disk_and_the_next_one_does_not_lose_it(cli, tmp_path: Path) -> None:
    document = tmp_path / "probe.json"
    done = cli("probe", "--quick", "--device", "cpu", "--disk", tmp_path, "--json", document)
    assert done.code == 0
    assert "disk, write" in done.out
    assert mount_of(str(tmp_path)).said in done.out
    (kept,) = json.loads(document.read_text())["disks"]
    assert cli("probe", "--quick", "--device", "cpu").code == 0
    measurement = measured.read_measurement()
    assert measurement is not None
    (again,) = measurement.disks
    assert again.read_bytes_per_s == kept["read_bytes_per_s"]
    assert "disk, read" not in cli("probe", "--quick", "--device", "cpu").out


def test_memory_is_told_by_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    rate = disk.measure_disk(str(tmp_path), quick=True)
    monkeypatch.setattr(disk, "mount_of", lambda folder: Mount("tmpfs", "tmpfs"))
    assert disk.how(rate, "any") == "in memory (tmpfs)"
    monkeypatch.setattr(disk, "mount_of", lambda folder: Mount("/dev/x", "xfs"))
    assert disk.how(rate, "any").startswith("xfs, ")
    assert f"{DEPTH} x 4.00 MiB" in disk.how(rate, "any")


def test_a_folder_that_is_not_there_is_told_before_anything_is_measured(cli) -> None:
    done = cli("probe", "--disk", "/nowhere/at/all")
    assert done.code == 2
    assert "--disk '/nowhere/at/all' is not there" in done.err
