"""What is kept back of a host's memory, and how a refusal says so."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headinfer.errors import MemoryPlanError
from headinfer.estimate.presets import preset_shape
from headinfer.plan.host_room import HostRoom, machine_bytes_for

GIB = 2**30
DEVICES = ["cpu", "cuda", "simulated"]


def h100_machine(**changes: int) -> HostRoom:
    """The machine beside an H100 whose memory 122 GiB of locked KV filled to the end."""
    available = int(123.31 * GIB)
    return HostRoom(device="cuda", all_bytes=126 * GIB, available_bytes=available, **changes)


@pytest.mark.parametrize(("tokens", "fits"), [(928, True), (976, False), (984, False)])
def test_llama_beside_an_h100(tokens: int, fits: bool) -> None:
    kv_bytes = preset_shape("llama-3-8b").kv_bytes(tokens * 1024)
    room = h100_machine()
    assert (kv_bytes <= room.kv_bytes) is fits
    if fits:
        room.check(kv_bytes, "the KV cache")
    else:
        with pytest.raises(MemoryPlanError, match="can be had"):
            room.check(kv_bytes, "the KV cache")


def test_a_refusal_shows_the_arithmetic() -> None:
    room = h100_machine(working_bytes=2 * GIB)
    with pytest.raises(MemoryPlanError) as refusal:
        room.check(122 * GIB, "the KV cache of 976K tokens")
    assert str(refusal.value).startswith("the KV cache of 976K tokens needs 122.00 GiB more of CPU")
    sizes = [float(size) for size in re.findall(r"([\d.]+) GiB", str(refusal.value))]
    assert sizes.pop(2) == 123.31
    needed, had, process, working, tables, reserve = sizes
    assert (needed, process, working) == (122.0, 1.0, 2.0)
    assert had == pytest.approx(123.31 - process - working - tables - reserve, abs=0.03)


def test_the_least_of_what_is_given_and_what_is_there_counts() -> None:
    given = h100_machine(given_bytes=10 * GIB, held_bytes=4 * GIB)
    assert given.kv_bytes == 6 * GIB
    with pytest.raises(MemoryPlanError, match=r"6.00 GiB can be had .*10.00 GiB, 4.00 GiB of it"):
        given.check(7 * GIB, "it")
    more = h100_machine(given_bytes=1024 * GIB)
    assert more.kv_bytes == h100_machine().kv_bytes
    with pytest.raises(MemoryPlanError, match=r"not the 1.00 TiB given .* 123.31 GiB are availa"):
        more.check(122 * GIB, "it")
    assert h100_machine(given_bytes=GIB, held_bytes=2 * GIB).kv_bytes == 0


@given(
    available=st.integers(0, 2**42),
    used=st.integers(0, 2**40),
    working=st.integers(0, 2**36),
    device=st.sampled_from(DEVICES),
)
def test_all_that_is_kept_back_adds_up(
    available: int, used: int, working: int, device: str
) -> None:
    room = HostRoom(
        device=device,
        all_bytes=available + used,
        available_bytes=available,
        working_bytes=working,
    )
    assert 0 <= room.kv_bytes <= available
    if room.kv_bytes:
        tables = room.kv_bytes * (88 if device == "cuda" else 8) // 4096
        kept = tables + room.process_bytes + working + room.reserve_bytes
        assert available - 4 <= room.kv_bytes + kept <= available


@given(kv_bytes=st.integers(1, 2**42), device=st.sampled_from(DEVICES))
def test_the_least_machine_has_room_and_a_smaller_one_has_not(kv_bytes: int, device: str) -> None:
    least = machine_bytes_for(kv_bytes, device)
    assert HostRoom.of_machine(least, device).kv_bytes >= kv_bytes
    assert HostRoom.of_machine(least - 8, device).kv_bytes < kv_bytes


def test_no_kv_needs_no_memory() -> None:
    assert machine_bytes_for(0, "cuda") == 0
