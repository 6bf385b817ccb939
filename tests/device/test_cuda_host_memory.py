"""Page-locked memory of caches that are gone; on a GPU."""

import pytest
import torch

from headinfer.device.cuda import CudaDevice

pytestmark = pytest.mark.gpu

MIB = 2**20


@pytest.mark.parametrize("num_bytes", [3 * MIB + 5, 40 * MIB])
def test_locked_memory_is_kept_and_stays_locked(num_bytes: int) -> None:
    device = CudaDevice(torch.device("cuda"))
    device.keep_host_memory(256 * MIB, None)
    for value in range(3):
        ahead = device.host_ahead(num_bytes)
        assert value == 0 or ahead.done()  # nobody had to lock it
        memory = ahead.result().fill_(value)
        assert memory.is_pinned()
        on_device = torch.empty_like(memory, device="cuda")
        device.copy_in.copy(on_device, memory)
        device.synchronize()
        assert bool((on_device == value).all())
        del memory, ahead
    assert device.spare_host_bytes >= num_bytes or num_bytes < 8 * MIB  # or a rest is left
    device.keep_host_memory(0, None)
    assert device.spare_host_bytes == 0
