"""Plans and predicted times of host memory above a disk, and what was measured of one."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

import headinfer
from headinfer.device.simulated import SimulatedDevice
from headinfer.disk.mount import Mount, mount_of
from headinfer.estimate.machines import HARDWARE
from headinfer.plan import measured
from headinfer.plan.below_host import InBlocks, disk_read_bytes
from headinfer.plan.hardware import DISK_BYTES_PER_S, DiskRate
from headinfer.plan.options import Options
from headinfer.plan.plan import Plan
from headinfer.plan.predict import Predictor
from headinfer.plan.resolve import resolve
from headinfer.plan.step_time import Placement
from headinfer.probe import keep
from measurements import CPU_ONLY, WITH_GPU
from shapes import LLAMA_3_8B
from tiny_models import random_tokens, tiny_model

CONTEXT, TOKEN = 100 * 1024, 128 * 1024
DISK = DiskRate(
    disk="/dev/x ext4",
    date="2026-03-01T10:00:00+00:00",
    direct=True,
    read_bytes_per_s=5e9,
    best_read_bytes_per_s=6e9,
    write_bytes_per_s=2e9,
)
RTX_4090 = HARDWARE["rtx-4090"]
PLACED = Placement(
    chunk_tokens=8192,
    tile_heads=8,
    tile_tokens=4096,
    disk_block_tokens=4096,
    disk_host_blocks=8,
)


def planned(room: int | None = 4 * 2**30, disk: DiskRate | None = DISK, **options: object) -> Plan:
    return resolve(
        LLAMA_3_8B,
        Options(device_memory_bytes=24 * 2**30, **options),  # type: ignore[arg-type]
        device="cuda",
        context_tokens=CONTEXT,
        hardware=RTX_4090.above_disk(disk),
        in_blocks=InBlocks(room),
    )


def test_a_step_takes_what_reading_the_disk_does() -> None:
    predictor = Predictor(LLAMA_3_8B, RTX_4090.above_disk(DISK))
    parts = predictor.decode(PLACED, CONTEXT)
    below = CONTEXT - 8 * 4096  # the step writes a token, too
    assert parts.disk_s == pytest.approx(below * TOKEN / 5e9 + TOKEN / 2e9)
    assert parts.limited_by == "the disk"
    assert parts.seconds(overlap=True) == pytest.approx(parts.disk_s + 0.1 * parts.start_s)
    assert parts.seconds(overlap=False) >= parts.disk_s + parts.link_s + parts.compute_s
    resident = replace(PLACED, resident_bytes=below * TOKEN)
    assert predictor.decode(resident, CONTEXT).disk_s == pytest.approx(TOKEN / 2e9)
    assert predictor.decode(PLACED, 8 * 4096 - 1).disk_s == 0


def test_a_chunk_writes_what_memory_has_no_room_for() -> None:
    predictor = Predictor(LLAMA_3_8B, RTX_4090.above_disk(DISK))
    part = predictor.chunk(PLACED, 28 * 1024, 8192).disk_s
    assert part == pytest.approx(4096 * TOKEN / 2e9)
    whole = predictor.chunk(PLACED, 60 * 1024, 8192).disk_s
    assert whole == pytest.approx(8192 * TOKEN / 2e9 + 28 * 1024 * TOKEN / 5e9)


def test_the_host_attends_no_more_than_lies_in_memory() -> None:
    predictor = Predictor(LLAMA_3_8B, RTX_4090)
    parts = predictor.decode(replace(PLACED, host_share=0.9), CONTEXT)
    in_memory = predictor.decode(replace(PLACED, host_share=8 * 4096 / CONTEXT), CONTEXT)
    assert parts.link_s == pytest.approx(in_memory.link_s)
    assert parts.compute_s == pytest.approx(in_memory.compute_s)
    plan = resolve(
        LLAMA_3_8B,
        Options(device_memory_bytes=24 * 2**30, resident_tokens=0),
        device="cuda",
        context_tokens=CONTEXT,
        hardware=replace(WITH_GPU.hardware, host_attention_bytes_per_s=300e9),
        in_blocks=InBlocks(4 * 2**30),
    )
    held = CONTEXT - plan.disk_tokens(CONTEXT)
    assert 0 < plan.host_share <= held / CONTEXT


def test_plans_are_chosen_in_blocks_that_there_is_room_for() -> None:
    plan = planned(resident_tokens=0)
    assert plan.disk_block_tokens * plan.disk_host_blocks * TOKEN + plan.disk_buffers_bytes <= 2**32
    assert plan.kv_host_bytes(CONTEXT) <= 2**32
    assert disk_read_bytes(plan, CONTEXT) == plan.disk_bytes(CONTEXT) > 8 * 2**30
    assert f"the oldest {plan.disk_tokens(CONTEXT) // 1024}K tokens on disk: " in str(plan)
    kept = planned()
    assert kept.resident_tokens
    less = plan.disk_bytes(CONTEXT) - kept.resident_tokens * TOKEN
    assert disk_read_bytes(kept, CONTEXT) == pytest.approx(less, abs=2**30)
    assert plan.placement.tile_tokens <= plan.disk_block_tokens  # a tile ends with its block
    for without in (planned(room=None), planned(room=2**20)):  # no disk; no room for a block
        assert not without.disk_block_tokens
        assert without.kv_host_bytes(CONTEXT) == CONTEXT * TOKEN


def test_a_step_reads_what_its_plan_says(tmp_path: Path) -> None:
    model = tiny_model(
        "llama3", num_hidden_layers=2, num_key_value_heads=2, num_attention_heads=4
    ).eval()
    offload = headinfer.attach(
        model,
        device="simulated",
        simulated_device=SimulatedDevice(),
        disk_cache=tmp_path,
        host_memory="464KiB",
        tile_heads=1,
        tile_tokens=64,
        chunk_tokens=64,
        resident_tokens=64,
        host_attention=0.5,
    )
    cache, ids, read = offload.new_cache(), random_tokens(1, 677), []
    model(ids[:, :641], past_key_values=cache)
    for position in range(641, 677):
        plan, before = cache.state.engine.plan, offload.stats.bytes_from_disk
        model(ids[:, position : position + 1], past_key_values=cache)
        read.append(offload.stats.bytes_from_disk - before)
    assert read[-1] == disk_read_bytes(plan, 676) == 2 * read[0] > 0  # once a page is sent home
    offload.detach()


def test_disks_are_kept_with_the_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = keep.save_measurement(replace(WITH_GPU, disks=(DISK,)))
    found = measured.load_measured(disk=DISK.disk)
    assert found is not None
    assert (found.disk_read_bytes_per_s, found.disk_write_bytes_per_s) == (5e9, 2e9)
    other = measured.load_measured(disk="/dev/y ext4")
    assert other is not None
    assert (other.disk_read_bytes_per_s, other.disk_measured) == (DISK_BYTES_PER_S, False)
    values = json.loads(path.read_text())
    del values["disks"]  # as files were before disks were measured
    assert measured.from_json(values) == WITH_GPU
    again = replace(DISK, read_bytes_per_s=4e9)
    before = replace(WITH_GPU, disks=(DISK, replace(DISK, disk="z")))
    kept = replace(CPU_ONLY, disks=(again,)).keeping_disks(before)
    assert [rate.disk for rate in kept.disks] == [DISK.disk, "z"]
    assert kept.disk_rate(DISK.disk) is again


def test_a_folder_is_on_a_disk_with_a_name(tmp_path: Path) -> None:
    assert mount_of(str(tmp_path)).disk
    assert mount_of("/dev/shm") == mount_of("/dev/shm/.")
    assert Mount("tmpfs", "tmpfs").said == "in memory (tmpfs)"
    assert Mount("/dev/nvme0n1", "xfs").said == "xfs"
