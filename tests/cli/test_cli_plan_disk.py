"""`headinfer plan --disk-cache`: what lies below CPU memory, its rate, and what is refused."""

import json
from dataclasses import replace

import pytest

from headinfer.cli import plan_question
from headinfer.disk.mount import Mount, mount_of
from headinfer.plan.hardware import DiskRate
from headinfer.probe import keep
from measurements import WITH_GPU, measured_here

QUESTION = ("plan", "--host-memory", "4GiB", "--hardware", "rtx-4090")


@pytest.fixture(autouse=True)
def _not_probed(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(plan_question, "free_bytes", lambda folder: 20 * 2**30)
    monkeypatch.setattr(plan_question, "mount_of", lambda folder: Mount("/dev/x", "ext4"))


@pytest.mark.slow
def test_a_context_beyond_cpu_memory_is_planned_with_a_disk_alone(cli, tmp_path) -> None:
    without = cli(*QUESTION, "--context", "100K")
    assert without.code == 1
    assert "CPU memory is" in without.out
    outcome = cli(*QUESTION, "--context", "100K", "--disk-cache", tmp_path, "--steps")
    assert outcome.code == 0
    told = " ".join(outcome.out.split())
    assert "4.00 GiB of CPU memory, 20.00 GiB free below (ext4)" in told
    assert f"GiB of KV lie in '{tmp_path}' (ext4), which has 20.00 GiB free" in told
    assert "limited by the disk at 1 GB/s, which is assumed: `headinfer probe --disk`" in told
    assert outcome.out.count("are read from the disk ahead of the link") == 2  # a step, a chunk
    assert max(map(len, outcome.out.splitlines())) <= 100
    assert "\n  standard                 -    15.0" in outcome.out


@pytest.mark.slow
def test_a_measured_disk_has_its_own_rate(cli, tmp_path) -> None:
    disk = DiskRate(
        disk=Mount("/dev/x", "ext4").disk,
        date="2026-03-01T10:00:00+00:00",
        direct=True,
        read_bytes_per_s=2.5e9,
        best_read_bytes_per_s=3e9,
        write_bytes_per_s=2e9,
    )
    keep.save_measurement(replace(measured_here(WITH_GPU), disks=(disk,)))
    outcome = cli(*QUESTION, "--context", "100K", "--disk-cache", tmp_path)
    assert "limited by the disk at 2.5 GB/s." in " ".join(outcome.out.split())
    document = json.loads(cli(*QUESTION, "--disk-cache", tmp_path, "--json").out)
    assert document["disk"] == {
        "folder": str(tmp_path),
        "file_system": "ext4",
        "free_bytes": 20 * 2**30,
        "read_bytes_per_s": 2.5e9,
        "write_bytes_per_s": 2e9,
        "measured": True,
    }
    asked = ("--context", "100K", "--disk-cache", tmp_path, "--chunk-tokens", "4K")
    several = " ".join(cli(*QUESTION[:3], "--hardware", "rtx-4090,h200", *asked).out.split())
    assert "each machine, 20.00 GiB free below (ext4)" in several
    assert "what they hold, with the disk; times" in several
    rows = {row["method"]: row for row in document["methods"]}
    assert rows["standard"]["kv_disk_bytes"] == 0
    chosen = document["chosen"]
    assert 0 < chosen["disk_read_bytes"] < rows["bounded"]["kv_disk_bytes"]
    assert chosen["kv_host_bytes"] + chosen["kv_disk_bytes"] >= chosen["kv_total_bytes"]


def test_what_memory_and_disk_do_not_hold_is_refused_with_the_room(cli, tmp_path) -> None:
    outcome = cli(*QUESTION, "--context", "1M", "--disk-cache", tmp_path)
    assert outcome.code == 1
    told = " ".join(outcome.out.split())
    assert f"'{tmp_path}' has room for 20.00 GiB." in told
    assert "more free, or as much more --host-memory" in told
    longest = told.split("--context ")[1].split(",")[0]
    assert cli(*QUESTION, "--context", longest, "--disk-cache", tmp_path).code == 0


@pytest.mark.slow
def test_packed_tokens_take_less_of_the_disk(cli, tmp_path) -> None:
    given = (*QUESTION, "--context", "100K", "--disk-cache", tmp_path)
    found = []
    for form in ("dense", "packed"):
        outcome = cli(*given, "--kv-cache", form, "--json", tmp_path / form)
        assert outcome.code == 0
        found.append(json.loads((tmp_path / form).read_text())["chosen"])
    dense, packed = (each["kv_host_bytes"] + each["kv_disk_bytes"] for each in found)
    assert 0 < packed < 0.85 * dense
    assert found[1]["disk_read_bytes"] < found[0]["disk_read_bytes"]


@pytest.mark.slow
def test_several_gpus_share_cpu_memory_and_the_disk(cli, tmp_path) -> None:
    given = ("plan", "--model", "llama-3-8b", "--hardware", "h100-80gb", "--gpus", "2")
    given += ("--device-memory", "18GiB", "--host-memory", "16GiB", "--disk-cache", tmp_path)
    outcome = cli(*given, "--context", "250K", "--json", tmp_path / "plan")
    assert outcome.code == 0
    told = " ".join(outcome.out.split())
    assert "16.00 GiB of CPU memory, 20.00 GiB free below (ext4)" in told
    assert f"of KV lie in '{tmp_path}' (ext4), which has 20.00 GiB free: a decode step" in told
    assert "The disk reads 1 GB/s, which is assumed: `headinfer probe --disk`." in told
    assert f"--disk-cache {tmp_path} ..." in told
    assert max(map(len, outcome.out.split("Run: ")[0].splitlines())) <= 100
    document = json.loads((tmp_path / "plan").read_text())
    assert document["disk"]["free_bytes"] == 20 * 2**30
    ours = [row for row in document["plans"] if row["method"] == "resident"]
    assert [(row["gpus"], row["split"]) for row in ours] == [
        *((1, "none"), (2, "layers"), (2, "heads"))
    ]
    kv_bytes = 250 * 1024 * 128 * 1024
    for row in ours:
        assert row["kv_host_bytes"] <= 15 * 2**30
        assert row["kv_host_bytes"] + row["kv_disk_bytes"] >= kv_bytes
        assert row["disk_read_bytes"] <= row["kv_disk_bytes"]
        assert row["decode_s_per_token"] >= row["disk_read_bytes"] / 1e9  # there is one disk
    # Residents of an answer are all that layers on two GPUs have on the disk.
    assert [row["disk_read_bytes"] > 0 for row in ours] == [True, False, True]
    outcome = cli(*given, "--context", "4M")
    assert outcome.code == 1
    assert "of the disk are lacking" in outcome.out
    longest = max(row["max_context_tokens"] for row in ours) // 1024
    assert f"--context {longest}K is the longest that fits." in outcome.out


def test_one_of_the_gpus_is_planned_as_without_them(cli, tmp_path) -> None:
    given = (*QUESTION, "--context", "100K", "--disk-cache", tmp_path, "--json")
    alone = json.loads(cli(*given).out)["chosen"]
    assert alone["method"] == "resident"
    *_, one = json.loads(cli(*given, "--gpus", "1").out)["plans"]
    for name in ("kv_host_bytes", "kv_disk_bytes", "disk_read_bytes", "decode_s_per_token"):
        assert one[name] == alone[name], name
    assert one["max_context_tokens"] // 1024 == alone["max_context_tokens"] // 1024


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--accounting", "paper"), "leave out --disk-cache"),
        (("--disk-cache", "/nowhere/at/all"), "is not there"),
    ],
)
def test_where_no_disk_can_be_is_told_in_one_line(cli, tmp_path, args, message) -> None:
    given = () if "--disk-cache" in args else ("--disk-cache", tmp_path)
    outcome = cli("plan", *given, *args)
    assert outcome.code == 2
    assert len(outcome.error_lines) == 1
    assert message in outcome.err


def test_the_folder_under_a_name_of_its_own_is_the_same_disk(tmp_path) -> None:
    assert mount_of(str(tmp_path)) == mount_of(str(tmp_path / ".." / tmp_path.name))
