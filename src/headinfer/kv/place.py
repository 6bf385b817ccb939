"""Places that give memory for tokens: the host, and one arena on the device."""

import collections
from collections.abc import Sized
from typing import NamedTuple

import torch

from headinfer.device.base import Device
from headinfer.device.host_ahead import HostMemory
from headinfer.device.launches import launches
from headinfer.errors import MemoryPlanError
from headinfer.kv.extent import Extent, Piece, copy_rows
from headinfer.kv.pair import Geometry
from headinfer.plan.memory import ALIGNMENT_BYTES, aligned


class _Asked(NamedTuple):
    """A piece of host memory that was asked for: for how many tokens, its bytes, and the piece."""

    tokens: int
    num_bytes: int
    memory: HostMemory


class Coming:
    """A queue of host memory for one layer that was asked for, and not taken yet.

    Args:
        device: gets the memory.
    """

    def __init__(self, device: Device) -> None:
        self._device = device
        self._asked: collections.deque[_Asked] = collections.deque()

    @property
    def tokens(self) -> int:
        """Tokens that it has room for."""
        tokens = 0
        for each in self._asked:  # without the frame of a comprehension
            tokens += each.tokens
        return tokens

    @property
    def num_bytes(self) -> int:
        """Bytes of it."""
        num_bytes = 0
        for each in self._asked:
            num_bytes += each.num_bytes
        return num_bytes

    @property
    def awaited_bytes(self) -> int:
        """Bytes of it that are not there yet."""
        return sum([each.num_bytes for each in self._asked if not each.memory.done()])

    def ask(self, geometry: Geometry, tokens: int) -> None:
        """Have memory for the rows of `tokens` tokens got in the background, in one piece."""
        tokens = geometry.format.covering(tokens)
        num_bytes = geometry.num_bytes(tokens)
        self._asked.append(_Asked(tokens, num_bytes, self._device.host_ahead(num_bytes)))

    def take(self, geometry: Geometry, start: int) -> Extent | None:
        """Return an empty extent in the next piece, once that is there; None where there is none.

        Raises:
            MemoryPlanError: it cannot be had. Nothing is asked for any more.
        """
        if not self._asked:
            return None
        asked = self._asked[0]
        try:
            with launches.paused():  # which it waits for
                memory = asked.memory.result()
            extent = Extent(Piece(memory), geometry, asked.tokens, start)
        except MemoryPlanError:
            self.cancel()
            raise
        self._asked.popleft()  # only now: Ctrl-C may come while it is waited for
        return extent

    def cancel(self) -> None:
        """Ask for none of it."""
        while self._asked:
            self._asked.popleft().memory.cancel()


class HostPlace:
    """A place in host memory: a piece for each extent, freed with the last ledger that holds it.

    Args:
        device: what the memory is for; it says how it must be allocated.

    Attributes:
        block_tokens: tokens of a block, where a disk lies below; 0 where none does.
        under_way: in the background, or failed there; nothing where no disk lies below.
    """

    block_tokens = 0
    under_way: Sized = ()

    @property
    def beside_bytes(self) -> int:
        """Bytes of memory that it has beside extents."""
        return 0

    def choose_sizes(self, block_tokens: int, host_blocks: int, staging_bytes: int) -> None:
        """Have blocks be of such sizes from now on; there are none here."""

    def settled(self) -> bool:
        """Wait for what is under way in the background; return whether all ended well."""
        return True

    def check(self) -> None:
        """Raise what failed in the background since the last check."""

    def go_on(self) -> None:
        """Do anew what failed in the background, before a pass that would go on."""

    def free(self) -> None:
        """Free memory beside what is held, with no work in flight."""

    def forget(self) -> None:
        """Discard what is under way in the background, and free its memory."""

    def __init__(self, device: Device) -> None:
        self._device = device

    def take(self, geometry: Geometry, tokens: int, start: int) -> Extent:
        """Return an empty extent with memory for `tokens` tokens, the first at `start`.

        Raises:
            MemoryPlanError: the host memory cannot be had.
        """
        memory = self._device.host_empty(geometry.num_bytes(tokens))
        return Extent(Piece(memory), geometry, tokens, start)

    def coming(self) -> Coming:
        """Return a queue of what a layer asks for."""
        return Coming(self._device)

    def give_back(self, extent: Extent) -> None:
        """Let go of an extent that no work in flight touches."""
        extent.piece.holders -= 1
        if not extent.piece.holders:
            self._device.host_access(extent.piece.memory, write=True, purpose="freeing host tokens")

    def copy_rows(self, source: Extent, target: Extent, rows: torch.Tensor) -> None:
        """Make row `i` of an extent what row `rows[i]` is in another one, or was in itself."""
        self.access(source, write=source is target, purpose="row selection")
        if source is not target:
            target.tokens = source.tokens
            self.access(target, write=True, purpose="row selection")
        copy_rows(source, target, rows)

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

    def take_alike(self, num_bytes: int, number: int) -> torch.Tensor:
        """Return the next `number` times `num_bytes`, `[number, num_bytes]`, as `take` would."""
        start, size = self._used, aligned(num_bytes)
        self._used = end = start + number * size
        assert end <= self._memory.numel(), "the arena is smaller than its plan"
        return self._memory[start:end].view(number, size)[:, :num_bytes]
