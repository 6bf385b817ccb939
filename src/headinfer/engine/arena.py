"""The device memory of one cache: allocated once, in one piece, of the size the plan states."""

import torch

from headinfer.device.base import Device

_ALIGNMENT_BYTES = 256
"""Every piece starts on such a boundary: what fused kernels and copy engines like best."""


class Arena:
    """Hands out pieces of one device allocation; asking for more than the plan is a defect.

    Args:
        device: where the memory is.
        num_bytes: the sum of the pieces to be taken.
        pieces: how many pieces will be taken; each may cost an alignment gap.
    """

    def __init__(self, device: Device, num_bytes: int, *, pieces: int) -> None:
        self.num_bytes = num_bytes
        self._memory = device.device_empty(num_bytes + pieces * _ALIGNMENT_BYTES)
        self._used = -self._memory.data_ptr() % _ALIGNMENT_BYTES

    def take(self, num_bytes: int) -> torch.Tensor:
        """Return the next `num_bytes` as a uint8 view, which lives as long as the arena."""
        start = self._used
        end = start + num_bytes
        assert end <= self._memory.numel(), "the arena is smaller than its plan"
        self._used = -(-end // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
        return self._memory[start:end]
