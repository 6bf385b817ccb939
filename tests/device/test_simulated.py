"""The simulated device: copies run late or early, and unordered accesses are found either way."""

import gc

import pytest
import torch

from headinfer.device.base import Edge
from headinfer.device.cpu import CpuDevice
from headinfer.device.hazards import HazardError
from headinfer.device.simulated import SimulatedDevice


def floats(device: SimulatedDevice, *, host: bool, value: float | None = None) -> torch.Tensor:
    memory = device.host_empty(16) if host else device.device_empty(16)
    tensor = memory.view(torch.float32)
    if value is not None:
        device.host_access(tensor, write=True, purpose="set-up")
        tensor.fill_(value)
    return tensor


@pytest.mark.parametrize("seed", range(20))
def test_a_waited_for_copy_is_there(seed: int) -> None:
    device = SimulatedDevice(seed=seed)
    source, target = floats(device, host=True, value=3.0), floats(device, host=False)
    device.copy_in.copy(target, source)
    device.compute.wait(device.copy_in.record(), Edge.TILE_FILLED)
    device.compute.reads(target, "test")
    assert (target == 3.0).all()


def test_copies_are_late_for_some_seeds_and_early_for_others() -> None:
    early = set()
    for seed in range(20):
        device = SimulatedDevice(seed=seed)
        source, target = floats(device, host=True, value=3.0), floats(device, host=False)
        device.copy_in.copy(target, source)
        early.add(bool((target == 3.0).all()))
    assert early == {True, False}


def test_memory_is_poisoned_and_accounted_for() -> None:
    device = SimulatedDevice()
    one, two = floats(device, host=False), floats(device, host=False)
    assert one.isnan().all()
    assert (device.allocated_bytes, device.peak_bytes) == (32, 32)
    del one
    gc.collect()
    assert (device.allocated_bytes, device.peak_bytes) == (16, 32)
    del two


@pytest.mark.parametrize("seed", range(5))
def test_a_read_without_a_wait_is_found_even_if_the_copy_ran(seed: int) -> None:
    device = SimulatedDevice(seed=seed)
    source, target = floats(device, host=True, value=3.0), floats(device, host=False)
    device.copy_in.copy(target, source)
    with pytest.raises(HazardError, match=r"read on compute \(test\) is not ordered after the wri"):
        device.compute.reads(target, "test")


def test_an_overwrite_without_a_wait_is_found() -> None:
    device = SimulatedDevice()
    source, target = floats(device, host=True, value=3.0), floats(device, host=False, value=1.0)
    device.compute.reads(target, "attention")
    with pytest.raises(HazardError, match=r"write on copy-in .* after the read on compute \(atten"):
        device.copy_in.copy(target, source)


def test_a_host_access_needs_the_host_to_wait() -> None:
    device = SimulatedDevice()
    source, target = floats(device, host=False, value=3.0), floats(device, host=True)
    device.copy_out.copy(target, source)
    with pytest.raises(HazardError, match="read on host"):
        device.host_access(target, write=False, purpose="test")
    device.copy_out.record().synchronize(Edge.HOST_SETTLED)
    device.host_access(target, write=True, purpose="test")
    assert (target == 3.0).all()


def test_waits_carry_over_streams() -> None:
    """copy-out, then copy-in after it, then compute after that: compute is after copy-out."""
    device = SimulatedDevice(seed=3)
    page, host = floats(device, host=False, value=5.0), floats(device, host=True)
    staging = floats(device, host=False)
    device.copy_out.copy(host, page)
    device.copy_in.wait(device.copy_out.record(), Edge.HOST_WRITTEN)
    device.copy_in.copy(staging, host)
    device.compute.wait(device.copy_in.record(), Edge.TILE_FILLED)
    device.compute.reads(staging, "test")
    device.compute.writes(page, "test")
    assert (staging == 5.0).all()


def test_neighbouring_bytes_do_not_conflict() -> None:
    device = SimulatedDevice()
    target = floats(device, host=False)
    device.copy_in.copy(target[:2], floats(device, host=True, value=1.0)[:2])
    device.compute.reads(target[2:], "test")
    with pytest.raises(HazardError):
        device.compute.reads(target[1:], "test")


def test_a_freed_address_can_be_used_again() -> None:
    device = SimulatedDevice()
    for _ in range(50):
        target = floats(device, host=False)
        device.copy_in.copy(target, floats(device, host=True, value=1.0))
        device.synchronize()
        del target
    assert device.allocated_bytes == 0


def test_the_cpu_device_has_no_streams() -> None:
    with pytest.raises(AssertionError, match="no streams"):
        _ = CpuDevice().copy_in
