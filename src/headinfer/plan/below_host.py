"""Plans of host memory above a disk: which have room for their blocks, and what is read from it."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from headinfer.errors import MemoryPlanError
from headinfer.plan.disk_blocks import all_with_disk
from headinfer.plan.joining import joined
from headinfer.plan.plan import Plan
from headinfer.plan.shape import ModelShape


@dataclass(frozen=True, slots=True)
class InBlocks:
    """A division of host memory into blocks above a disk; or none.

    Attributes:
        room_bytes: host memory for the cache; None where no disk lies below it.
        beside: what of the model lies on other devices, whose blocks share that memory. They are
            taken to have the same sizes, as they are not chosen yet.
    """

    room_bytes: int | None = None
    beside: tuple[ModelShape, ...] = ()

    def of(self, plan: Plan) -> Iterator[Plan]:
        """Yield a plan with its blocks; nothing where there is no room for any."""
        if self.room_bytes is None:
            yield plan
            return
        others = [replace(plan, shape=shape) for shape in self.beside]
        with contextlib.suppress(MemoryPlanError):
            yield all_with_disk([plan, *others], self.room_bytes)[0]


def above_disk(plan: Plan, room_bytes: int, block_tokens: Sequence[int] = ()) -> Plan:
    """Return a plan with its blocks, of one device or of several.

    Args:
        plan: of a cache.
        room_bytes: host memory that it may take.
        block_tokens: of the blocks that it has already on each device; empty for none.

    Raises:
        MemoryPlanError: that is too little.
    """
    return joined(plan.shape, all_with_disk(plan.of_devices, room_bytes, block_tokens))


def in_few_blocks(plan: Plan) -> Plan:
    """Return a plan in blocks of little host memory: at most an eighth above the least."""
    room_bytes = 2**16
    while True:
        with contextlib.suppress(MemoryPlanError):
            return above_disk(plan, room_bytes)
        room_bytes += room_bytes // 8


def share_in_memory(plan: Plan) -> float:
    """Return the share of what is not resident that the CPU can attend: what is on no disk."""
    tokens = plan.context_tokens or 0
    below, beside = plan.disk_tokens(tokens), tokens - plan.resident_tokens
    return min((tokens - below) / beside, 1.0) if below and beside > 0 else 1.0


def disk_read_bytes(plan: Plan, tokens: int) -> int:
    """Return the bytes that a decode step behind `tokens` tokens reads from the disk.

    The newest tokens may be in a page on the device still, which goes home as a whole. Until then a
    block may be missing below, and a step reads as much less.
    """
    return sum(read_bytes(part, part.disk_tokens(tokens)) for part in plan.of_devices)


def read_bytes(plan: Plan, disk_tokens: int) -> int:
    """Return the bytes that a decode step reads of so many tokens on the disk.

    Args:
        plan: of one device.
        disk_tokens: the oldest ones, of which some may be resident.
    """
    return plan.shape.host_kv_bytes(max(disk_tokens - plan.resident_tokens, 0), plan.batch)
