"""Host memory for pages that a packed form has no room for, or that are not full, as they are.

Whether a page overflows is known on the device, long after its copy home was enqueued. So there is
room for all pages of some chunks, should all of them overflow. How many did is written to host
memory behind each chunk. That is looked at when it is there, and waited for where there is no room.

A page that is not full is packed anew with the tokens that follow. So each layer has slots of its
own for that one page, which are written over until it is full.
"""

import collections
from typing import NamedTuple

import torch

from headinfer.device.base import Device, Mark
from headinfer.device.launches import launches
from headinfer.errors import MemoryPlanError
from headinfer.kv.ledger import Ledger
from headinfer.plan.memory import KEYS_AND_VALUES
from headinfer.plan.raw_room import LEAST_LEAD, RawRoom


def begun_slots(device: Device, ledger: Ledger) -> torch.Tensor:
    """Return a layer's slots for the page that its next tokens go on in.

    Whoever writes there comes behind all that reads that page: tiles fetched before are stale.

    Returns:
        `[slots, slot_bytes]` of uint8 in host memory, for keys and values of all heads. The ledger
        owns it, and each piece that has had such a page.
    """
    geometry = ledger.geometry
    count = KEYS_AND_VALUES * geometry.batch * geometry.kv_heads
    dim = max(geometry.key_dim, geometry.value_dim)
    slot_bytes = ledger.home.format.row_tokens * dim * geometry.dtype.itemsize
    slots = ledger.begun_slots
    if slots is None or slots.shape != (count, slot_bytes):  # rows may have come or gone
        with torch.inference_mode(False):
            slots = device.host_empty(count * slot_bytes).view(count, slot_bytes)
        ledger.begun_slots = slots
    return slots


def addressed(device: Device, memory: torch.Tensor) -> torch.Tensor:
    """Return slots of host memory as the device addresses them.

    Raises:
        MemoryPlanError: their address is another one there.
    """
    with torch.inference_mode(False):
        there = device.mapped(memory.view(-1)).view(memory.shape)
    if there.data_ptr() != memory.data_ptr():
        raise MemoryPlanError(
            "this kv_cache needs one address for CPU memory on the CPU and the GPU, and this "
            "system has two; use kv_cache=dense (--kv-cache dense)"
        )
    return there


class Block:
    """A block of slots in host memory for pages as they are. Compute takes slots, one by one.

    Args:
        device: whose compute takes them.
        slots: how many.
        slot_bytes: of each.

    Attributes:
        memory: `[slots, slot_bytes]` of uint8; whoever refers to a slot keeps all of it.
        on_device: the same memory, as the device addresses it.
        taken: `[1]` of int64 on the device: slots that are taken.
        room: slots that are left, should compute take all that it may.
        coming: pages that may take a slot each, and are not counted yet.
    """

    def __init__(self, device: Device, slots: int, slot_bytes: int) -> None:
        with torch.inference_mode(False):  # or they could not be written to outside it
            self.memory = device.host_empty(slots * slot_bytes).view(slots, slot_bytes)
            self.taken = torch.zeros(1, dtype=torch.int64, device=device.torch_device)
            counted = device.host_empty(torch.int64.itemsize)
            self._counted = counted.view(torch.int64)
            self._counted_on_device = device.mapped(counted).view(torch.int64)
        self.on_device = addressed(device, self.memory)
        self._slots = self.room = slots
        self.coming = 0

    @property
    def is_unused(self) -> bool:
        """Whether no slot is taken, and none may be."""
        return self.room == self._slots

    def may_take(self, pages: int) -> None:
        """Have so many slots be those of pages to come."""
        self.coming += pages
        self.room -= pages

    def count(self) -> None:
        """Have the slots counted, behind compute's work."""
        # A kernel writes there, as others read what is mapped; a copy would be the driver's.
        torch.add(self.taken, 0, out=self._counted_on_device)

    def was_counted(self, pages: int) -> None:
        """Make room for what so many pages did not take, now that this was counted.

        Slots that later pages took may be in the number already. These count twice until their
        own turn comes: there is more room then, never less.
        """
        self.coming -= pages
        self.room = self._slots - int(self._counted) - self.coming


class _Count(NamedTuple):
    """A count on its way: when it is there, of which block, and for how many pages."""

    mark: Mark
    block: Block
    pages: int


class RawPages:
    """A pool of slots in host memory, for pages as they are.

    No slot is given back. Blocks are taken as they are needed, up to those of a room. Behind them,
    or where no memory is left for one, whoever needs slots waits for what was counted. Blocks that
    have too few are replaced.

    Args:
        device: takes the slots.
        room: for pages.

    Attributes:
        begun_taken: slots taken of a layer's own, `[1]` of int64 on the device: from 0 on for each
            of its pages.
    """

    def __init__(self, device: Device, room: RawRoom) -> None:
        self._device, self._slot_bytes = device, room.slot_bytes
        self._block_slots, self._most_blocks = room.block_chunks * room.chunk_slots, room.blocks
        self._blocks: list[Block] = []
        self._counts: collections.deque[_Count] = collections.deque()
        with torch.inference_mode(False):
            self.begun_taken = torch.zeros(1, dtype=torch.int64, device=device.torch_device)

    @property
    def memory(self) -> list[torch.Tensor]:
        """What the blocks lie in that slots are taken of."""
        return [block.memory for block in self._blocks]

    def serves(self, room: RawRoom) -> bool:
        """Whether its blocks do for another room: their slots are as large, and enough."""
        least = LEAST_LEAD * room.chunk_slots
        return self._slot_bytes == room.slot_bytes and self._block_slots >= least

    def go_on_in(self, room: RawRoom) -> None:
        """Take as many blocks as another room has slots for, which it must serve."""
        self._most_blocks = max(room.slots // self._block_slots, 1)

    def with_room(self, pages: int) -> Block:
        """Return a block in which some pages have slots from now on, should none of them pack.

        Whoever launches what takes them calls `note` behind it.

        Raises:
            MemoryPlanError: there is no memory for a block, and no count to wait for.
        """
        while self._counts and self._counts[0].mark.reached:
            self._hear()
        while True:
            for block in self._blocks:
                if block.room >= pages:
                    block.may_take(pages)  # first: an interruption leaves none that nobody counts
                    return block
            if len(self._blocks) >= self._most_blocks:
                self._blocks = [block for block in self._blocks if block.coming]
            if not self._took_block():
                self._wait()

    def note(self, block: Block, pages: int) -> None:
        """Have a block's slots counted, behind compute's work for so many pages."""
        block.count()
        self._counts.append(_Count(self._device.mark_compute(), block, pages))

    def forget_unused(self) -> list[torch.Tensor]:
        """Let go of blocks that no page has a slot of; return what they lie in. It waits."""
        while self._counts:
            self._wait()
        unused = [block.memory for block in self._blocks if block.is_unused]
        self._blocks = [block for block in self._blocks if not block.is_unused]
        return unused

    def forget(self) -> None:
        """Let go of all blocks: no page has a slot any more. It waits for the device."""
        if not self._blocks:
            return
        self._device.synchronize()  # what was interrupted is in no count
        self._counts.clear()
        self._blocks.clear()

    def _took_block(self) -> bool:
        """Take another block, if there may be one and there is memory for it."""
        if len(self._blocks) >= self._most_blocks:
            return False
        try:
            self._blocks.append(Block(self._device, self._block_slots, self._slot_bytes))
        except MemoryPlanError:
            if not self._counts:
                raise
            return False
        return True

    def _wait(self) -> None:
        """Wait for the oldest count; without one, blocks have slots that nobody will count."""
        if not self._counts:
            self.forget()
            return
        with launches.paused():
            self._counts[0].mark.wait()
        self._hear()

    def _hear(self) -> None:
        """Take note of the oldest count, which is there."""
        count = self._counts.popleft()
        count.block.was_counted(count.pages)
