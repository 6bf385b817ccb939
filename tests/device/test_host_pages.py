"""Host memory in small pieces of larger regions."""

import ctypes
import errno
import gc
import weakref
from pathlib import Path

import psutil
import pytest
import torch

from headinfer.device import host_pages
from headinfer.device.host_pages import Pieces, commit, map_host_memory, map_pages
from headinfer.device.regions import Region
from headinfer.errors import MemoryPlanError

MIB = 2**20


class Regions:
    """Maps regions and notes their sizes; refuses those over a limit."""

    def __init__(self, most_bytes: int = 2**40) -> None:
        self.sizes: list[int] = []
        self.storages: list[weakref.ref[torch.UntypedStorage]] = []
        self._most_bytes = most_bytes

    def allocate(self, num_bytes: int) -> torch.Tensor:
        if num_bytes > self._most_bytes:
            raise MemoryPlanError(f"no {num_bytes} bytes are left")
        self.sizes.append(num_bytes)
        region = map_host_memory(num_bytes)
        self.storages.append(weakref.ref(region.untyped_storage()))
        return region


def test_the_layers_of_a_short_prompt_share_regions() -> None:
    regions = Regions()
    pieces = Pieces(regions.allocate)
    layers = [pieces.take(3 * MIB + 5) for _ in range(20)]
    for number, layer in enumerate(layers):
        layer.fill_(number)
    assert regions.sizes == [32 * MIB, 32 * MIB]
    for number, layer in enumerate(layers):
        assert layer.numel() == 3 * MIB + 5
        assert layer.data_ptr() % 4096 == 0
        assert (layer == number).all()


def test_large_memory_has_a_region_of_exactly_its_size() -> None:
    regions = Regions()
    pieces = Pieces(regions.allocate)
    assert pieces.take(9 * MIB).numel() == 9 * MIB
    assert pieces.take(0).numel() == 0
    assert regions.sizes == [9 * MIB, 0]


def test_a_region_is_freed_with_its_last_piece() -> None:
    regions = Regions()
    pieces = Pieces(regions.allocate)
    layers = [pieces.take(MIB) for _ in range(9)]
    (first, second) = regions.storages
    kept = layers[3]
    layers.clear()
    gc.collect()
    assert first() is not None
    del kept
    gc.collect()
    assert first() is None
    assert second() is not None  # its rest is for what comes next
    assert pieces.take(7 * MIB).numel() == 7 * MIB
    assert len(regions.sizes) == 2


def test_where_a_region_cannot_be_had_the_piece_is() -> None:
    regions = Regions(most_bytes=4 * MIB)
    pieces = Pieces(regions.allocate)
    assert pieces.take(MIB).numel() == MIB
    assert regions.sizes == [MIB]
    with pytest.raises(MemoryPlanError, match="left"):
        pieces.take(5 * MIB)


@pytest.mark.parametrize("num_bytes", [0, 1, 4097, 50 * MIB + 5])
def test_memory_that_is_committed_is_there_and_0(num_bytes: int) -> None:
    memory = map_host_memory(num_bytes)
    before = psutil.Process().memory_info().rss
    commit(memory)
    grown = psutil.Process().memory_info().rss - before
    assert grown > num_bytes // 2 or num_bytes < MIB
    assert not memory.any()


@pytest.mark.parametrize("error", [errno.EINVAL, errno.ENOMEM])
def test_where_the_system_commits_nothing_memory_is_written_or_refused(
    error: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Library:
        @staticmethod
        def madvise(*_arguments: int) -> int:
            ctypes.set_errno(error)
            return -1

    monkeypatch.setattr(host_pages, "_libc", Library)
    memory = map_host_memory(MIB).fill_(1)
    if error == errno.ENOMEM:
        with pytest.raises(MemoryPlanError, match=r"no 1.00 MiB of CPU memory left"):
            commit(memory)
    else:
        commit(memory)
        assert not memory.any()


def large_pages_of(address: int) -> int:
    """Return the bytes in large pages of the mapping that has an address."""
    is_mine = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, *rest = line.split()
        if not first.endswith(":"):
            begin, end = (int(each, 16) for each in first.split("-"))
            is_mine = begin <= address < end
        elif is_mine and first == "AnonHugePages:":
            return int(rest[0]) * 1024
    return 0


LARGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


@pytest.mark.skipif(
    not LARGE_PAGES.exists() or "[madvise]" not in LARGE_PAGES.read_text(),
    reason="the system does not give large pages where they are asked for",
)
@pytest.mark.parametrize("at_once", [True, False])
def test_what_is_committed_at_once_has_large_pages(at_once: bool) -> None:
    memory = Region(map_pages(8 * MIB, at_once=at_once)).tensor(8 * MIB)
    commit(memory)
    large = large_pages_of(memory.data_ptr())
    assert 6 * MIB <= large <= 8 * MIB if at_once else not large
