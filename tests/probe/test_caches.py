"""How large the processor's caches are, as Linux tells."""

import os
from pathlib import Path

import pytest

from headinfer.probe import caches
from headinfer.probe.caches import beyond_caches, last_level_cache_bytes


@pytest.fixture(autouse=True)
def _four_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _process: {0, 1, 2, 3}, raising=False)


def describe(cpus: Path, cpu: int, index: int, level: str, size: str, shared: str) -> None:
    folder = cpus / f"cpu{cpu}" / "cache" / f"index{index}"
    folder.mkdir(parents=True)
    for name, text in (("level", level), ("size", size), ("shared_cpu_list", shared)):
        (folder / name).write_text(text + "\n")


def test_each_cache_of_the_last_level_counts_once(tmp_path: Path) -> None:
    for cpu in range(4):
        describe(tmp_path, cpu, 0, "1", "32K", str(cpu))
        describe(tmp_path, cpu, 2, "2", "1024K", str(cpu))
        describe(tmp_path, cpu, 3, "3", "32768K", "0-1" if cpu < 2 else "2-3")
    assert last_level_cache_bytes(tmp_path) == 64 * 2**20


@pytest.mark.parametrize(
    ("level", "size"), [("3", "unknown"), ("3", ""), ("x", "32768K"), ("3", "12X")]
)
def test_what_cannot_be_read_is_left_out(tmp_path: Path, level: str, size: str) -> None:
    describe(tmp_path, 0, 3, level, size, "0")
    assert last_level_cache_bytes(tmp_path) == 64 * 2**20  # what is assumed
    describe(tmp_path, 1, 2, "2", "2M", "1")
    assert last_level_cache_bytes(tmp_path) == 2 * 2**20


def test_processors_of_others_do_not_count(tmp_path: Path) -> None:
    for cpu in (0, 4):
        describe(tmp_path, cpu, 3, "3", "1024K", str(cpu))
    assert last_level_cache_bytes(tmp_path) == 2**20


@pytest.mark.parametrize(
    ("cache", "free", "least", "wanted"),
    [(30, 2**20, 5, 120), (30, 960, 5, 60), (30, 960, 80, 80), (1, 2**20, 5, 5)],
)
def test_buffers_exceed_the_caches_but_leave_memory_free(
    cache: int, free: int, least: int, wanted: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(caches, "last_level_cache_bytes", lambda: cache)
    monkeypatch.setattr(caches, "available_host_bytes", lambda: free)
    assert beyond_caches(least) == wanted


def test_without_a_description_something_is_assumed(tmp_path: Path) -> None:
    assert last_level_cache_bytes(tmp_path / "nowhere") == 64 * 2**20
