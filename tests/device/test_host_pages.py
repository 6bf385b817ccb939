"""Host memory in small pieces of larger regions."""

import gc
import weakref

import pytest
import torch

from headinfer.device.host_pages import Pieces, map_host_memory
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
    assert len(regions.sizes) == 3
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
