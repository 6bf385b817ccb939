"""Memory of the simulated device and its host: handed out again, and checked when it is freed.

Device memory comes from a caching allocator, as torch's is. Such an allocator orders the owners of
a block on the compute stream alone. A new owner's memory may be in use there by what was enqueued
before. Memory that is freed may be in use by what is enqueued from then on, the model's own
operations among it. Host memory is the system's again once it is freed, so that the host itself
must come last.
"""

import collections
import weakref
from collections.abc import Callable

import torch

from headinfer.device.hazards import AccessLog, Clock, HazardError, join

_POISON = 0xFF  # as float16, bfloat16 and float32 alike: NaN
_MULTIPLE_BYTES = 512  # torch's own


class Blocks:
    """A set of blocks of device memory, kept when they are freed.

    A block stays in place as long as this object, so that a copy which comes too late spoils what
    the next owner has there.

    Attributes:
        allocated_bytes: what was asked for and is not freed.
        peak_bytes: the most that ever was.
    """

    def __init__(self) -> None:
        self.allocated_bytes = 0
        self.peak_bytes = 0
        self._blocks: dict[int, bytearray] = {}  # by address
        self._free: collections.defaultdict[int, list[bytearray]] = collections.defaultdict(list)

    def take(self, num_bytes: int) -> torch.Tensor:
        """Return poisoned memory `[num_bytes]` of uint8, in a block that was freed if one is there.

        The block is the memory's storage. The caller gives it back when nothing views it any more.
        """
        block_bytes = max(-(-num_bytes // _MULTIPLE_BYTES), 1) * _MULTIPLE_BYTES
        free = self._free[block_bytes]
        block = free.pop() if free else bytearray(block_bytes)
        with torch.inference_mode(False):  # or it could not be written to outside
            tensor = torch.frombuffer(block, dtype=torch.uint8).fill_(_POISON)[:num_bytes]
        self._blocks[tensor.untyped_storage().data_ptr()] = block
        self.allocated_bytes += num_bytes
        self.peak_bytes = max(self.peak_bytes, self.allocated_bytes)
        return tensor

    def give_back(self, address: int, num_bytes: int) -> None:
        """Keep a block for its next owner.

        Args:
            address: of the block.
            num_bytes: what was asked for when it was taken.
        """
        block = self._blocks[address]
        self._free[len(block)].append(block)
        self.allocated_bytes -= num_bytes

    def hold(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor lies in a block, which stays in place when the tensor is freed."""
        return tensor.untyped_storage().data_ptr() in self._blocks


class LateMemory:
    """A piece of host memory that is got when somebody takes it, and no sooner.

    Args:
        get: returns it.
    """

    def __init__(self, get: Callable[[], torch.Tensor]) -> None:
        self._get = get
        self._memory: torch.Tensor | None = None

    def result(self) -> torch.Tensor:
        """Return it."""
        if self._memory is None:
            self._memory = self._get()
        return self._memory

    def cancel(self) -> None:
        """Let go of it."""
        self._memory = None

    def done(self) -> bool:
        """Whether it was taken."""
        return self._memory is not None


class SimulatedMemory:
    """A record of all memory that streams touch, from its first touch or handing out until freed.

    Args:
        compute: the clock of the compute stream, which advances as that does.
        host: the clock of the host, which advances as that does.

    Attributes:
        blocks: the device memory.
        log: accesses.
    """

    def __init__(self, *, compute: Clock, host: Clock) -> None:
        self.blocks = Blocks()
        self.log = AccessLog()
        self._compute = compute
        self._host = host
        self._watched: set[int] = set()  # addresses of storages whose end is waited for
        self._hazard = ""  # not the error, whose traceback keeps the memory of those it came upon

    def host_empty(self, num_bytes: int) -> torch.Tensor:
        """Return poisoned host memory, which had no owner before that anything still touches."""
        with torch.inference_mode(False):  # or it could not be written to outside
            tensor = torch.full((num_bytes,), _POISON, dtype=torch.uint8, device="cpu")
        self._watch(tensor, self._host_memory_freed)
        return tensor

    def device_empty(self, num_bytes: int) -> torch.Tensor:
        """Return poisoned device memory, which compute may still use; the caller states that."""
        tensor = self.blocks.take(num_bytes)
        self._watch(tensor, self._block_freed, num_bytes)
        return tensor

    def access(
        self, tensor: torch.Tensor, clock: Clock, stream: str, write: bool, purpose: str
    ) -> None:
        """Check an access and remember it, as `AccessLog.add` does, until the memory is freed."""
        if tensor.untyped_storage().data_ptr() not in self._watched:
            self._watch(tensor, self._device_memory_freed)  # the model's own
        self.log.add(tensor, clock, stream, write, purpose)

    def check(self) -> None:
        """Raise what was found when memory was freed; a finalizer's error would be lost.

        Streams ask this before new work, and tests at their end.

        Raises:
            HazardError: memory was freed before the last work on it was waited for.
        """
        if self._hazard:
            raise HazardError(self._hazard)

    def _watch(self, tensor: torch.Tensor, freed: Callable[..., None], *arguments: int) -> None:
        storage = tensor.untyped_storage()
        address = storage.data_ptr()
        self._watched.add(address)
        weakref.finalize(storage, freed, address, *arguments).atexit = False

    def _block_freed(self, address: int, num_bytes: int) -> None:
        self._device_memory_freed(address)
        self.blocks.give_back(address, num_bytes)

    def _device_memory_freed(self, address: int) -> None:
        clock = dict(self._compute)
        join(clock, dict(self._host))  # which is before what compute does next
        self._end(address, clock, "what compute has this memory for next")

    def _host_memory_freed(self, address: int) -> None:
        self._end(address, self._host, "what the host has this memory for next")

    def _end(self, address: int, clock: Clock, next_use: str) -> None:
        """Forget a storage; note where a use of it is not over at a clock."""
        self._watched.discard(address)
        try:
            self.log.release(address, clock, next_use)
        except HazardError as error:
            self._hazard = self._hazard or str(error)
