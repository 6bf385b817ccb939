"""Host memory on the CPU device."""

import pytest
import torch

from headinfer.device.cpu import CpuDevice
from headinfer.errors import MemoryPlanError


@pytest.mark.parametrize("num_bytes", [0, 1, 4096, 5 * 2**20 + 3])
def test_memory_is_of_the_size_asked_for(num_bytes: int) -> None:
    memory = CpuDevice().host_empty(num_bytes)
    assert memory.shape == (num_bytes,)
    with torch.inference_mode():
        memory.fill_(7)
    memory.add_(1)  # outside inference mode too
    assert memory.eq(8).all()


def test_what_cannot_be_mapped_is_refused() -> None:
    with pytest.raises(MemoryPlanError, match=r"cannot map 4194304\.00 TiB of CPU memory"):
        CpuDevice().host_empty(2**62)
