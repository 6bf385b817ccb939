"""The device memory of one cache: allocated once, in one piece, of the size the plan states."""

import torch

from headinfer.device.base import Device
from headinfer.plan.memory import ALIGNMENT_BYTES, aligned


class Arena:
    """Hands out pieces of one device allocation; asking for more than the plan is a defect.

    Args:
        device: where the memory is.
        num_bytes: the aligned sizes of all pieces to be taken, and one alignment more.

    Attributes:
        num_bytes: as given.
    """

    def __init__(self, device: Device, num_bytes: int) -> None:
        self.num_bytes = num_bytes
        self._memory = device.device_empty(num_bytes)
        self._used = -self._memory.data_ptr() % ALIGNMENT_BYTES

    def take(self, num_bytes: int) -> torch.Tensor:
        """Return the next `num_bytes` as a uint8 view, which lives as long as the arena."""
        start = self._used
        end = start + num_bytes
        assert end <= self._memory.numel(), "the arena is smaller than its plan"
        self._used = start + aligned(num_bytes)
        return self._memory[start:end]
