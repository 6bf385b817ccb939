"""The simulated device: copies run late or early, and unordered accesses are found either way."""

import gc

import pytest
import torch

from headinfer.device.base import Edge
from headinfer.device.cpu import CpuDevice
from headinfer.device.hazards import HazardError
from headinfer.device.simulated import SimulatedDevice
from held_device import HeldDevice


def floats(device: SimulatedDevice, *, host: bool, value: float | None = None) -> torch.Tensor:
    memory = device.host_empty(16) if host else device.device_empty(16)
    device.finish_compute()  # with what it did with that memory before
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
    source, target = floats(device, host=True, value=1.0), floats(device, host=False)
    device.copy_in.copy(target[:2], source[:2])
    device.compute.reads(target[2:], "test")
    with pytest.raises(HazardError):
        device.compute.reads(target[1:], "test")


def test_a_freed_address_can_be_used_again() -> None:
    device = SimulatedDevice()
    for _ in range(50):
        source, target = floats(device, host=True, value=1.0), floats(device, host=False)
        device.copy_in.copy(target, source)
        device.synchronize()
        del source, target
    assert device.allocated_bytes == 0


def test_freed_memory_is_handed_out_again_and_poisoned() -> None:
    device = SimulatedDevice()
    one = floats(device, host=False, value=3.0)
    address = one.data_ptr()
    del one
    larger = device.device_empty(1024)
    again, other = floats(device, host=False), floats(device, host=False)
    assert again.data_ptr() == address
    assert again.isnan().all()
    assert address not in (larger.data_ptr(), other.data_ptr())
    assert (device.allocated_bytes, device.peak_bytes) == (1056, 1056)


@pytest.mark.parametrize("name", ["copy_in", "copy_out", "host_work"])
def test_new_memory_may_be_in_use_on_compute(name: str) -> None:
    device = SimulatedDevice()
    stream = getattr(device, name)
    early = device.compute.record()
    memory = device.device_empty(16)
    device.compute.writes(memory[:8], "test")
    stream.wait(early, Edge.MEMORY_FREE)
    with pytest.raises(HazardError, match=r"after the write on compute \(what had this memory bef"):
        stream.writes(memory[8:], "test")
    stream.wait(device.compute.record(), Edge.MEMORY_FREE)
    stream.writes(memory, "test")


def test_a_copy_that_comes_too_late_spoils_what_the_next_owner_has() -> None:
    device = HeldDevice()  # which checks no access
    source, freed = floats(device, host=True, value=3.0), floats(device, host=False)
    device.copy_in.copy(freed, source)
    del freed
    memory = device.device_empty(16).view(torch.float32).fill_(1.0)
    assert (memory == 1.0).all()
    device.synchronize()
    assert (memory == 3.0).all()


@pytest.mark.parametrize("seed", range(5))
def test_device_memory_must_not_be_freed_before_copies_are_waited_for(seed: int) -> None:
    device = SimulatedDevice(seed=seed)
    source, target = floats(device, host=True, value=3.0), floats(device, host=False)
    device.copy_in.copy(target, source)
    del target
    with pytest.raises(HazardError, match=r"next is not ordered after the write on copy-in"):
        device.device_empty(16)


@pytest.mark.parametrize("host_waits", [True, False])
def test_device_memory_may_be_freed_once_the_host_or_compute_has_waited(host_waits: bool) -> None:
    device = SimulatedDevice()
    source, target = floats(device, host=True, value=3.0), floats(device, host=False)
    device.copy_in.copy(target, source)
    copied = device.copy_in.record()
    if host_waits:
        copied.synchronize(Edge.HOST_SETTLED)
    else:
        device.compute.wait(copied, Edge.TILE_FILLED)
    device.compute.reads(target, "what compute itself does needs no wait")
    del target
    device.memory.check()
    assert device.allocated_bytes == 0


def test_host_memory_must_not_be_freed_before_the_host_has_waited() -> None:
    device = SimulatedDevice()
    source, target = floats(device, host=True, value=3.0), floats(device, host=False)
    device.copy_in.copy(target, source)
    device.compute.wait(device.copy_in.record(), Edge.TILE_FILLED)  # which is another's wait
    del source
    device.synchronize()  # too late
    with pytest.raises(HazardError, match=r"the host has .* not ordered after the read on copy-in"):
        device.memory.check()


@pytest.mark.parametrize("waits", [True, False])
def test_what_the_model_frees_must_not_be_in_use_beside_compute(waits: bool) -> None:
    device = SimulatedDevice()
    query, sent = torch.ones(4), floats(device, host=True)
    device.compute.writes(query, "the query")
    device.host_work.wait(device.compute.record(), Edge.QUERY_READY)
    device.host_work.copy(sent, query)
    if waits:
        device.compute.wait(device.host_work.record(), Edge.ANSWERED)
        del query
        device.memory.check()
        return
    del query
    device.synchronize()
    with pytest.raises(HazardError, match=r"compute has .* after the read on host-work"):
        device.compute.writes(torch.ones(1), "what comes next")


def test_the_cpu_device_has_no_streams() -> None:
    with pytest.raises(AssertionError, match="no streams"):
        _ = CpuDevice().copy_in


@pytest.mark.parametrize("seed", range(20))
def test_a_host_function_runs_in_stream_order(seed: int) -> None:
    device = SimulatedDevice(seed=seed)
    on_device = floats(device, host=False)
    query, answer, arrived = (floats(device, host=host) for host in (True, True, False))
    stream = device.host_work
    on_device.fill_(3.0)
    device.compute.writes(on_device, "set-up")
    stream.wait(device.compute.record(), Edge.QUERY_READY)
    stream.copy(query, on_device)
    stream.reads(query, "test")
    stream.writes(answer, "test")
    stream.run(lambda: answer.copy_(query + 1.0))
    stream.copy(arrived, answer)
    device.compute.wait(stream.record(), Edge.ANSWERED)
    device.compute.reads(arrived, "test")
    assert (arrived == 4.0).all()


def test_host_functions_are_late_for_some_seeds_and_early_for_others() -> None:
    early = set()
    for seed in range(20):
        device, ran = SimulatedDevice(seed=seed), []
        device.host_work.run(lambda ran=ran: ran.append(1))
        early.add(bool(ran))
        device.synchronize()
        assert ran == [1]
    assert early == {True, False}


def test_a_host_function_must_not_use_the_device() -> None:
    device = SimulatedDevice(seed=1)
    device.host_work.run(lambda: device.compute.record() and None)
    with pytest.raises(AssertionError, match="must not use the device"):
        device.synchronize()


def test_what_a_host_function_accesses_is_checked() -> None:
    device = SimulatedDevice()
    answer = floats(device, host=True)
    device.host_work.writes(answer, "the answer")
    device.host_work.run(lambda: None)
    with pytest.raises(HazardError, match=r"read on host .*after the write on host-work"):
        device.host_access(answer, write=False, purpose="test")


def test_a_tensor_with_gaps_is_checked_piece_by_piece() -> None:
    device = SimulatedDevice()
    heads, source = floats(device, host=True).view(2, 2), floats(device, host=False, value=1.0)
    device.copy_out.copy(heads[1, :1], source[:1])
    device.host_work.reads(heads[:, 1:], "test")
    with pytest.raises(HazardError, match="read on host-work"):
        device.host_work.reads(heads[:, :1], "test")


@pytest.mark.parametrize("seed", range(10))
def test_timed_events_tell_their_order(seed: int) -> None:
    device, ran = SimulatedDevice(seed=seed), []
    device.host_work.run(lambda: ran.append(1))
    answered = device.host_work.record(timed=True)
    was_early = answered.reached
    done = device.compute.record(timed=True)
    assert (done.seconds_to(answered) is None) == (not answered.reached)
    device.synchronize()
    late_s, early_s = done.seconds_to(answered), answered.seconds_to(done)
    assert late_s is not None
    assert early_s == -late_s
    assert (late_s < 0) == was_early


def test_an_address_the_model_used_can_be_used_for_other_memory() -> None:
    device = SimulatedDevice()
    tensor = torch.ones(4)
    address = tensor.untyped_storage().data_ptr()
    device.compute.reads(tensor, "test")
    assert address in device.memory.log._by_storage
    del tensor
    gc.collect()
    assert address not in device.memory.log._by_storage
