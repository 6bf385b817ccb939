"""Host memory for pages that a packed form has no room for, or that are not full, as they are.

Whether a page overflows is known on the device, long after its copy home was enqueued. So there is
room for all pages of a chunk, should all of them overflow. How many did is written to host memory
behind each chunk, and looked at before room could run out.

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

_COUNTS = 64
"""Counts on their way at most."""


class _Count(NamedTuple):
    """A count on its way: when it is there, where, and how much it can add at most."""

    mark: Mark
    at: int
    most: int


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


class RawPages:
    """A pool of slots in host memory, for pages as they are.

    Compute takes slots, and none is given back. Whoever refers to a slot keeps the block it is in.

    Args:
        device: takes the slots.
        slot_bytes: of a page as it is.
        num_bytes: of all slots of a block. They are enough for the pages of two chunks, so that
            mostly nobody waits to hear how many were taken.

    Attributes:
        block: `[slots, slot_bytes]` of uint8 in host memory, where slots are taken now.
        on_device: the same memory, as the device addresses it.
        taken: `[1]` of int64 on the device: slots taken of the block.
        begun_taken: the same of a layer's own slots, from 0 on for each of its pages.
    """

    block: torch.Tensor
    on_device: torch.Tensor

    def __init__(self, device: Device, slot_bytes: int, num_bytes: int) -> None:
        self._device, self._slot_bytes = device, slot_bytes
        self._slots = num_bytes // slot_bytes
        self._counts: collections.deque[_Count] = collections.deque()
        self._next = 0
        self._known = self._slots  # of the block, and so there is none yet
        with torch.inference_mode(False):  # or they could not be written to outside it
            self.taken = torch.zeros(1, dtype=torch.int64, device=device.torch_device)
            self.begun_taken = torch.zeros_like(self.taken)
            memory = device.host_empty(_COUNTS * torch.int64.itemsize)
            self._seen = memory.view(torch.int64)
            self._seen_on_device = device.mapped(memory).view(torch.int64)

    def is_enough(self, slot_bytes: int, num_bytes: int) -> bool:
        """Whether its slots are of a size, and as many as fit into so many bytes."""
        return self._slot_bytes == slot_bytes and self._slots >= num_bytes // slot_bytes

    def have_room(self, pages: int) -> None:
        """Have slots for some pages, should all of them overflow."""
        while self._known + sum(count.most for count in self._counts) + pages > self._slots:
            if not self._counts:
                self._begin_block()
                return
            self._look()
        if len(self._counts) == _COUNTS:
            self._look()

    def note(self, pages: int) -> None:
        """Have the slots counted that so many pages may have taken, behind compute's work."""
        at, self._next = self._next, (self._next + 1) % _COUNTS
        # A kernel writes there, as others read what is mapped; a copy would be the driver's.
        torch.add(self.taken, 0, out=self._seen_on_device[at : at + 1])
        self._counts.append(_Count(self._device.mark_compute(), at, pages))

    def _look(self) -> None:
        """Wait for the oldest count."""
        with launches.paused():
            self._counts[0].mark.wait()
        self._known = int(self._seen[self._counts.popleft().at])

    def _begin_block(self) -> None:
        with torch.inference_mode(False):
            memory = self._device.host_empty(self._slots * self._slot_bytes)
            self.block = memory.view(self._slots, self._slot_bytes)
        self.on_device = addressed(self._device, self.block)
        self.taken.zero_()
        self._known = 0
