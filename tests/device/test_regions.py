"""Regions of host memory that are kept for the next cache."""

import gc
import threading

import pytest
import torch

from headinfer.device.host_pages import Pieces, map_pages
from headinfer.device.regions import Region, SpareRegions
from headinfer.errors import MemoryPlanError

MIB = 2**20


class Maker:
    """Makes regions and counts them; has so many bytes in all, where that is given."""

    def __init__(self, all_bytes: int = 2**40) -> None:
        self.made: list[int] = []
        self.undone: list[int] = []
        self.left_bytes = all_bytes

    def __call__(self, num_bytes: int) -> Region:
        if num_bytes > self.left_bytes:
            raise MemoryPlanError("no memory is left")
        self.made.append(num_bytes)
        self.left_bytes -= num_bytes
        return Region(map_pages(num_bytes), lambda: self.undo(num_bytes))

    def undo(self, num_bytes: int) -> None:
        self.undone.append(num_bytes)
        self.left_bytes += num_bytes


def sources(make: Maker, spare_bytes: int, most_bytes: int | None = None) -> SpareRegions:
    regions = SpareRegions(make, lambda: make.left_bytes)
    regions.keep(spare_bytes, most_bytes)
    return regions


def test_memory_that_is_given_back_serves_the_next() -> None:
    make = Maker()
    regions = sources(make, 8 * MIB)
    first = regions.take(3 * MIB).fill_(7)
    address, view = first.data_ptr(), first[5:9]
    del first
    assert regions.spare_bytes == 0  # a view holds it
    del view
    assert (regions.spare_bytes, make.undone) == (3 * MIB, [])
    second = regions.take(3 * MIB - 100)
    assert second.data_ptr() == address
    assert second.numel() == 3 * MIB - 100
    assert regions.take(3 * MIB).data_ptr() != address
    assert make.made == [3 * MIB, 3 * MIB]


def test_much_less_gets_memory_of_its_own() -> None:
    make = Maker()
    regions = sources(make, 8 * MIB)
    regions.take(4 * MIB)
    assert regions.take(2 * MIB).numel() == 2 * MIB
    assert regions.take_spare(5 * MIB) is None
    assert regions.take(0).numel() == 0
    assert make.made == [4 * MIB, 2 * MIB, 0]


def test_nothing_is_kept_unless_asked_and_the_oldest_goes_first() -> None:
    make = Maker()
    regions = SpareRegions(make)
    regions.take(MIB)
    assert (regions.spare_bytes, make.undone) == (0, [MIB])
    regions.keep(3 * MIB)
    held = [regions.take(size * MIB) for size in (1, 2, 1)]
    while held:
        held.pop(0)
    assert (regions.spare_bytes, make.undone[1:]) == (3 * MIB, [MIB])
    regions.keep(0)
    assert (regions.spare_bytes, make.left_bytes) == (0, 2**40)


def test_kept_and_used_memory_stay_within_what_was_given() -> None:
    make = Maker()
    regions = sources(make, 8 * MIB, most_bytes=5 * MIB)
    regions.take(3 * MIB)
    assert regions.spare_bytes == 3 * MIB
    used = regions.take(4 * MIB)  # 3 more are too many
    assert (regions.spare_bytes, make.undone) == (0, [3 * MIB])
    regions.take(2 * MIB)
    assert regions.spare_bytes == 0
    del used
    assert regions.spare_bytes == 4 * MIB


def test_what_is_kept_makes_room_where_memory_is_short() -> None:
    make = Maker(all_bytes=10 * MIB)
    regions = sources(make, 4 * MIB)
    regions.take(4 * MIB)
    assert regions.spare_bytes == 4 * MIB
    assert regions.take(8 * MIB).numel() == 8 * MIB
    with pytest.raises(MemoryPlanError, match="no memory"):
        regions.take(11 * MIB)


def test_a_refusal_is_tried_again_without_what_is_kept() -> None:
    make = Maker(all_bytes=10 * MIB)
    regions = SpareRegions(make)  # it does not know what is free
    regions.keep(4 * MIB)
    regions.take(4 * MIB)
    assert regions.take(8 * MIB).numel() == 8 * MIB


def test_what_is_kept_goes_with_its_owner() -> None:
    make = Maker()
    regions = sources(make, 8 * MIB)
    kept = regions.take(MIB)
    regions.take(2 * MIB)
    del regions
    gc.collect()
    assert make.undone == []  # memory that is given back may still be kept
    del kept
    gc.collect()
    assert sorted(make.undone) == [MIB, 2 * MIB]


def test_pieces_of_one_prompt_serve_the_next() -> None:
    make = Maker()
    regions = sources(make, 256 * MIB)
    pieces = Pieces(regions.take, regions.take_spare)
    for tokens in (700, 1000, 600):
        layers = [pieces.take(tokens * 4096) for _ in range(32)]
        assert len({layer.data_ptr() for layer in layers}) == 32
        layers.clear()
    assert len(make.made) == 5  # of 8 to 13 pieces; a rest was left for what comes next
    assert pieces.take_ready(2 * MIB) is not None
    assert pieces.take_ready(100 * MIB) is None


def test_ready_memory_waits_for_nobody() -> None:
    making, made = threading.Event(), threading.Event()

    def allocate(num_bytes: int) -> torch.Tensor:
        making.set()
        assert made.wait(20)
        return torch.empty(num_bytes, dtype=torch.uint8)

    pieces = Pieces(allocate, lambda num_bytes: torch.empty(num_bytes, dtype=torch.uint8))
    thread = threading.Thread(target=pieces.take, args=(MIB,))
    thread.start()
    try:
        assert making.wait(20)
        assert pieces.take_ready(MIB) is None
    finally:
        made.set()
        thread.join()
    assert pieces.take_ready(MIB) is not None


def test_threads_take_and_give_back_at_once() -> None:
    make = Maker()
    regions = sources(make, 40_000)
    wrong = []

    def use(number: int) -> None:
        for turn in range(200):
            memory = regions.take(4096 * (1 + (number + turn) % 3)).fill_(number)
            if not (memory == number).all():
                wrong.append(number)

    threads = [threading.Thread(target=use, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert regions.spare_bytes <= 40_000
    regions.keep(0)
    assert make.left_bytes == 2**40
