"""Places that give memory for tokens: the host, and one arena on the device."""

from headinfer.device.base import Device
from headinfer.kv.extent import Extent, Piece
from headinfer.kv.pair import Geometry
from headinfer.plan.memory import ALIGNMENT_BYTES, aligned


class HostPlace:
    """A place in host memory: a piece for each extent, freed with the last ledger that holds it.

    Args:
        device: what the memory is for; it says how it must be allocated.
    """

    def __init__(self, device: Device) -> None:
        self._device = device

    def take(self, geometry: Geometry, tokens: int, start: int) -> Extent:
        """Return an empty extent with memory for `tokens` tokens, the first at `start`.

        Raises:
            MemoryPlanError: the host memory cannot be had.
        """
        memory = self._device.host_empty(geometry.num_bytes(tokens))
        return Extent(Piece(memory), geometry, tokens, start)

    def give_back(self, extent: Extent) -> None:
        """Let go of an extent that no work in flight touches."""
        extent.piece.holders -= 1
        if not extent.piece.holders:
            self._device.host_access(extent.piece.memory, write=True, purpose="freeing host tokens")

    def access(self, extent: Extent, *, write: bool, purpose: str) -> None:
        """State that the host itself now reads or writes an extent's memory."""
        self._device.host_access(extent.piece.memory, write=write, purpose=purpose)


class Arena:
    """A cache's device memory: allocated once, in one piece, of the size that the plan states.

    Asking it for more is a defect.

    Args:
        device: where the memory is.
        num_bytes: the aligned sizes of all pieces to be taken, and one alignment more.

    Attributes:
        num_bytes: of the whole.
    """

    def __init__(self, device: Device, num_bytes: int) -> None:
        self.num_bytes = num_bytes
        self._memory = device.device_empty(num_bytes)
        self._used = -self._memory.data_ptr() % ALIGNMENT_BYTES

    def take(self, num_bytes: int) -> Piece:
        """Return the next `num_bytes`; the arena lives as long as any of its pieces."""
        start = self._used
        end = start + num_bytes
        assert end <= self._memory.numel(), "the arena is smaller than its plan"
        self._used = start + aligned(num_bytes)
        return Piece(self._memory[start:end])
