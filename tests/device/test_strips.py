"""Copies as strips: whatever the layouts, the strips together are the copy."""

import ctypes
from collections.abc import Iterable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headinfer.device import strips as module
from headinfer.device.strips import Strip, strips, token_strips


def run(destination: torch.Tensor, source: torch.Tensor) -> int:
    """Copy between tensors, strip by strip; return how many there were."""
    return perform(strips(destination, source))


def perform(found: Iterable[Strip]) -> int:
    """Copy as a copy engine does; return how many strips there were."""
    count = 0
    for strip in found:
        assert strip.width_bytes <= strip.destination_pitch_bytes
        assert strip.width_bytes <= strip.source_pitch_bytes
        for row in range(strip.height):
            ctypes.memmove(
                strip.destination + row * strip.destination_pitch_bytes,
                strip.source + row * strip.source_pitch_bytes,
                strip.width_bytes,
            )
        count += 1
    return count


@st.composite
def layouts(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor]:
    """Two views of equal shape: slices of larger tensors, with axes in any order."""
    dims = draw(st.integers(1, 4))
    shape = [draw(st.integers(0, 4)) for _ in range(dims)]
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.uint8]))
    views = []
    for _ in range(2):
        order = draw(st.permutations(range(dims)))
        before, after = ([draw(st.integers(0, 2)) for _ in range(dims)] for _ in range(2))
        whole = [before[axis] + shape[axis] + after[axis] for axis in order]
        tensor = torch.zeros(whole, dtype=dtype)
        cut = [slice(before[axis], before[axis] + shape[axis]) for axis in order]
        views.append(tensor[tuple(cut)].permute([order.index(axis) for axis in range(dims)]))
    return views[0], views[1]


@settings(deadline=None)
@given(layouts())
def test_the_strips_of_any_two_layouts_are_the_copy(
    pair: tuple[torch.Tensor, torch.Tensor],
) -> None:
    destination, source = pair
    source.copy_(torch.arange(1, source.numel() + 1).reshape(source.shape) % 97)
    around = destination._base if destination._base is not None else destination
    run(destination, source)
    assert torch.equal(destination, source)
    assert int(around.count_nonzero()) == int(source.count_nonzero())  # nothing else was written


def pair(
    batch: int, heads: int, capacity: int, dims: tuple[int, int], dtype: torch.dtype
) -> list[torch.Tensor]:
    """Return zeros for keys and values, which lie one behind the other as in a layer's memory."""
    sizes = [batch * heads * capacity * dim for dim in dims]
    parts = torch.zeros(sum(sizes), dtype=dtype).split(sizes)
    return [part.view(batch, heads, capacity, dim) for part, dim in zip(parts, dims, strict=True)]


@settings(deadline=None)
@given(
    batch=st.integers(1, 3),
    heads=st.integers(1, 4),
    dims=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    tokens=st.integers(1, 5),
    around=st.tuples(*[st.integers(0, 3)] * 4),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    most_pitch_bytes=st.sampled_from([8, 2**31 - 1]),
)
def test_the_strips_of_tokens_are_their_copy(
    batch: int,
    heads: int,
    dims: tuple[int, int],
    tokens: int,
    around: tuple[int, int, int, int],
    dtype: torch.dtype,
    most_pitch_bytes: int,
) -> None:
    at, behind, first, more = around
    destination = pair(batch, heads, at + tokens + behind, dims, dtype)
    source = pair(batch, heads, first + tokens + more, dims, dtype)
    for part in source:
        part.copy_(torch.arange(1, part.numel() + 1).reshape(part.shape) % 97)
    with pytest.MonkeyPatch.context() as patching:
        patching.setattr(module, "MAX_PITCH_BYTES", most_pitch_bytes)
        found = token_strips(destination, at, source, first, tokens)
    assert all(
        strip.height == 1
        or max(strip.destination_pitch_bytes, strip.source_pitch_bytes) <= most_pitch_bytes
        for strip in found
    )
    perform(found)
    for ours, whole in zip(destination, source, strict=True):
        sent = whole[:, :, first : first + tokens]
        assert torch.equal(ours[:, :, at : at + tokens], sent)
        assert int(ours.count_nonzero()) == int(sent.count_nonzero())  # nothing else was written


def test_keys_and_values_that_lie_alike_are_one_strip() -> None:
    destination, source = (pair(2, 4, capacity, (8, 8), torch.bfloat16) for capacity in (50, 30))
    assert len(token_strips(destination, 40, source, 5, 10)) == 1
    apart = [part.clone() for part in source]
    assert len(token_strips(destination, 40, apart, 5, 10)) == 2


def test_the_heads_of_a_tile_are_one_strip() -> None:
    store = torch.randn(1, 8, 100, 16)
    tile = torch.empty(1, 8, 30, 16)
    assert run(tile, store[:, :, 40:70]) == 1
    assert torch.equal(tile, store[:, :, 40:70])
    assert run(torch.empty(1, 3, 30, 16), store[:, 2:5, 40:70]) == 1


def test_rows_of_a_batch_join_the_strip_where_all_heads_are_taken() -> None:
    store = torch.randn(3, 4, 50, 8)
    assert run(torch.empty(3, 4, 20, 8), store[:, :, :20]) == 1
    assert run(torch.empty(3, 2, 20, 8), store[:, :2, :20]) == 3


def test_heads_too_far_apart_for_a_copy_engine_are_copied_one_by_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "MAX_PITCH_BYTES", 100 * 16 * 4 - 1)
    store, tile = torch.randn(1, 8, 100, 16), torch.empty(1, 8, 30, 16)
    assert run(tile, store[:, :, :30]) == 8
    assert torch.equal(tile, store[:, :, :30])
