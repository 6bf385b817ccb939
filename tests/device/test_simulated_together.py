"""Captures that several simulated devices take part in, and the order of what they do around it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from headinfer.device.base import CaptureError, Edge
from headinfer.device.hazards import HazardError, abroad
from headinfer.device.simulated import SimulatedDevice


def devices(count: int = 2, **options: Any) -> list[SimulatedDevice]:
    return [SimulatedDevice(seed=seed, **options) for seed in range(count)]


def memory(device: SimulatedDevice, *, host: bool = False) -> torch.Tensor:
    """Return 4 floats."""
    taken = device.host_empty(16) if host else device.device_empty(16)
    return taken.view(torch.float32)


def summed(*places: tuple[SimulatedDevice, torch.Tensor]) -> Callable[[], torch.Tensor]:
    """Return work in which each device's compute adds one to memory; the last one's sum comes."""

    def work() -> torch.Tensor:
        for device, there in places:
            device.compute.writes(there, "the sum")
            there.add_(1)
        return there.sum()

    return work


def fill(device: SimulatedDevice, there: torch.Tensor, value: float) -> torch.Tensor:
    """Have copy-in fill memory from the host's, which is returned, and compute wait for that."""
    here = memory(device, host=True)
    device.host_access(here, write=True, purpose="set-up")
    here.fill_(value)
    device.copy_in.wait(device.compute.record(), Edge.TILE_FREE)
    device.copy_in.copy(there, here)
    device.compute.wait(device.copy_in.record(), Edge.TILE_FILLED)
    return here


def test_a_replay_does_the_work_of_all() -> None:
    first, second, third = all_devices = devices(3)
    places = [(device, memory(device).fill_(0)) for device in all_devices]
    capture = first.capture(summed(*places), second, third)
    for count in (2, 3):  # it ran when it was captured, too
        assert float(capture.replay()) == 4 * count
    assert [there.tolist() for _, there in places] == [[3.0] * 4] * 3


@pytest.mark.parametrize("skip", [None, Edge.STEP_JOINED, Edge.STEP_FORKED])
def test_a_launch_comes_after_what_another_device_did(skip: Edge | None) -> None:
    first, second = devices(skip=[] if skip is None else [skip])
    here, there = memory(first), memory(second)
    capture = first.capture(summed((first, here), (second, there)), second)
    kept = fill(second, there, 5.0)
    if skip is None:
        assert float(capture.replay()) == 24.0
    else:
        with pytest.raises(HazardError, match=r"on compute in a graph .* not ordered after"):
            capture.replay()
    second.synchronize()
    assert kept.tolist() == [5.0] * 4


@pytest.mark.parametrize("skip", [None, Edge.STEP_JOINED, Edge.STEP_FORKED])
def test_what_another_device_does_next_comes_after_a_launch(skip: Edge | None) -> None:
    first, second = devices()
    here, there = memory(first), memory(second).fill_(0)
    capture = first.capture(summed((first, here), (second, there)), second)
    for device in (first, second):
        device.skipped_edges = frozenset() if skip is None else frozenset({skip})
    capture.replay()
    if skip is None:
        second.compute.reads(there, "test")
    else:
        with pytest.raises(HazardError, match="not ordered after the write on compute in a graph"):
            second.compute.reads(there, "test")


def test_a_stream_of_another_device_takes_part_from_when_it_waits() -> None:
    first, second = devices()
    there = memory(second)
    host = memory(second, host=True)

    def work(*, waits: bool, joins: bool = True) -> None:
        if waits:
            second.copy_in.wait(second.compute.record(), Edge.TILE_FREE)
        second.copy_in.copy(there, host)
        if joins:
            second.compute.wait(second.copy_in.record(), Edge.TILE_FILLED)

    with pytest.raises(CaptureError, match="takes no part"):
        first.capture(lambda: work(waits=False), second)
    with pytest.raises(CaptureError, match="does not wait for all"):
        first.capture(lambda: work(waits=True, joins=False), second)
    second.host_access(host, write=True, purpose="set-up")
    host.fill_(2.0)
    capture = first.capture(lambda: work(waits=True), second)
    for _ in range(2):
        capture.replay()
        second.compute.reads(there, "test")
        assert there.tolist() == [2.0] * 4


def test_functions_between_pieces_are_outside_of_the_graph() -> None:
    first, second = devices()
    there, seen = memory(second).fill_(0), []

    def aside() -> None:
        seen.append(second.compute is outside)
        second.compute.writes(there, "the function between")
        there.mul_(10)

    def work() -> torch.Tensor:
        summed((second, there))()
        second.aside(aside)
        return summed((second, there))()

    outside = second.compute
    capture = first.capture(work, second)
    assert seen == []
    there.fill_(0)
    assert [float(capture.replay()) for _ in range(2)] == [4 * 11, 4 * 121]
    assert seen == [True, True]
    assert second.compute is outside


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_failure_within_leaves_all_as_before(error: type[BaseException]) -> None:
    first, second = devices()
    outside, there = second.compute, memory(second).fill_(0)

    def failing() -> None:
        raise error

    with pytest.raises(error):
        first.capture(failing, second)
    capture = first.capture(lambda: second.aside(failing), second)
    with pytest.raises(error):
        capture.replay()
    assert (first.recorder, second.recorder, second.compute) == (None, None, outside)
    assert float(first.capture(summed((second, there)), second).replay()) == 8.0


def test_a_clock_names_the_streams_of_other_devices() -> None:
    clock = {"compute": 3, "copy-in@2": 5, "host@1": 7, "compute@12": 1}
    assert abroad(clock, 0, 2) == {"compute@0": 3, "copy-in": 5, "host@1": 7, "compute@12": 1}
    assert abroad(abroad(clock, 0, 2), 2, 0) == {
        "compute": 3,
        "copy-in@2": 5,
        "host@1": 7,
        "compute@12": 1,
    }
