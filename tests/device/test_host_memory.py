"""How much host memory there is, by accounts that Linux might give."""

from pathlib import Path

import psutil
import pytest

from headinfer.device import host_memory
from headinfer.device.host_memory import all_host_bytes, available_host_bytes

MIB = 2**20
UNLIMITED_V1 = str(2**63 - 4096)


class Machine:
    """Folders as Linux fills them: a machine of 64 GiB, 60 of them available."""

    def __init__(self, root: Path) -> None:
        self.proc, self.cgroup = root / "proc", root / "cgroup"
        (self.proc / "self").mkdir(parents=True)
        self.cgroup.mkdir()
        self.describe()

    def describe(self, **more_mib: int) -> None:
        values = {"MemTotal": 64 * 1024, "MemAvailable": 60 * 1024}
        values |= {name.replace("_file", "(file)"): mib for name, mib in more_mib.items()}
        lines = [f"{name}: {mib * 1024} kB" for name, mib in values.items()]
        (self.proc / "meminfo").write_text("\n".join(lines))

    def member(self, line: str) -> None:
        (self.proc / "self" / "cgroup").write_text(line + "\n")

    def group(self, name: str, **files: object) -> None:
        folder = self.cgroup / name
        folder.mkdir(parents=True, exist_ok=True)
        for file, text in files.items():
            (folder / f"memory.{file}").write_text(f"{text}\n")


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    machine = Machine(tmp_path)
    monkeypatch.setattr(host_memory, "_PROC", machine.proc)
    monkeypatch.setattr(host_memory, "_CGROUP", machine.cgroup)
    return machine


def free_mib() -> float:
    return available_host_bytes() / MIB


def test_a_machine_without_limits(machine: Machine) -> None:
    assert all_host_bytes() == 64 * 1024 * MIB
    assert free_mib() == 60 * 1024


def test_files_in_use_are_not_available(machine: Machine) -> None:
    files = {"Active_file": 3000, "Inactive_file": 5000}
    machine.describe(**files, Mapped=700, Dirty=200, Writeback=100, Shmem=900)
    assert free_mib() == 60 * 1024 - 1000
    # What is mapped may be memory shared between processes, which is no file and not available.
    machine.describe(Active_file=100, Inactive_file=0, Mapped=700)
    assert free_mib() == 60 * 1024 - 100


@pytest.mark.parametrize("text", ["", "MemTotal", "MemAvailable: lots kB"])
def test_another_system_is_asked_otherwise(
    machine: Machine, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (machine.proc / "meminfo").write_text(text)
    memory = psutil.virtual_memory()
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    assert all_host_bytes() == memory.total
    assert available_host_bytes() == memory.available


def test_the_group_of_a_container_counts_and_files_are_given_back(machine: Machine) -> None:
    machine.member("0::/")
    stat = f"anon 5\nactive_file {300 * MIB}\ninactive_file {200 * MIB}\nfile_mapped {120 * MIB}"
    machine.group("", max=4096 * MIB, high="max", current=1000 * MIB, stat=stat)
    assert all_host_bytes() == 4096 * MIB
    assert free_mib() == 4096 - 1000 + 500 - 120


@pytest.mark.parametrize("limited", ["", "jobs", "jobs/mine"])
def test_every_group_above_this_process_counts(machine: Machine, limited: str) -> None:
    machine.member("0::/jobs/mine")
    machine.group("jobs/others", max=MIB, current=0, stat="anon 0")
    for name in ("", "jobs", "jobs/mine"):
        limit = 2048 * MIB if name == limited else "max"
        machine.group(name, max=limit, current=48 * MIB, stat="anon 0")
    assert all_host_bytes() == 2048 * MIB
    assert free_mib() == 2000


def test_a_limit_that_slows_down_is_a_limit(machine: Machine) -> None:
    machine.member("0::/jobs")
    machine.group("jobs", max="max", high=1024 * MIB, current=24 * MIB, stat="anon 0")
    assert free_mib() == 1000


def test_groups_of_version_1(machine: Machine) -> None:
    machine.member("7:cpu:/mine\n4:hugetlb,memory:/jobs/mine\n0::/")
    machine.group("memory", limit_in_bytes=UNLIMITED_V1, usage_in_bytes=50 * MIB, stat="cache 0")
    stat = f"inactive_file 0\ntotal_inactive_file {100 * MIB}\ntotal_dirty {30 * MIB}"
    limits = {"limit_in_bytes": 3000 * MIB, "usage_in_bytes": 500 * MIB, "stat": stat}
    machine.group("memory/jobs", **limits)
    machine.group("memory/jobs/mine", **(limits | {"limit_in_bytes": UNLIMITED_V1}))
    assert all_host_bytes() == 3000 * MIB
    assert free_mib() == 3000 - 500 + 100 - 30


def test_a_container_sees_its_group_of_version_1_at_the_top(machine: Machine) -> None:
    machine.member("4:memory:/docker/0123456789")
    machine.group("memory", limit_in_bytes=700 * MIB, usage_in_bytes=100 * MIB, stat="cache 0")
    assert free_mib() == 600


def test_a_group_that_is_full_leaves_nothing(machine: Machine) -> None:
    machine.member("0::/../elsewhere")
    machine.group("elsewhere", max=100 * MIB, current=140 * MIB, stat="anon 0")
    assert available_host_bytes() == 0
