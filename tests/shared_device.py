"""A simulated device whose memory caches share: what their arenas hold is not free."""

from headinfer.device.simulated import SimulatedDevice


class SharedDevice(SimulatedDevice):
    """A device of so much memory beside a model's weights.

    Args:
        num_bytes: of memory.
    """

    def __init__(self, num_bytes: int) -> None:
        super().__init__()
        self._num_bytes = num_bytes

    def free_bytes(self) -> int:
        """Return what no arena holds."""
        return self._num_bytes - self.memory.blocks.allocated_bytes
