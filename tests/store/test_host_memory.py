"""What of the host's memory can be had."""

from headinfer.store.host_memory import available_host_bytes


def test_available_host_memory_is_plausible() -> None:
    assert 2**20 < available_host_bytes() < 2**50
