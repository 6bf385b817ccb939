"""Plans of host memory above a disk: which have room for their blocks, and what is read from it."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

from headinfer.errors import MemoryPlanError
from headinfer.plan.disk_blocks import with_disk
from headinfer.plan.memory import blocks_bytes
from headinfer.plan.plan import Plan


@dataclass(frozen=True, slots=True)
class InBlocks:
    """A division of host memory into blocks above a disk; or none.

    Attributes:
        room_bytes: host memory for the cache; None where no disk lies below it.
    """

    room_bytes: int | None = None

    def of(self, plan: Plan) -> Iterator[Plan]:
        """Yield a plan with its blocks; nothing where there is no room for any."""
        if self.room_bytes is None:
            yield plan
            return
        with contextlib.suppress(MemoryPlanError):
            yield with_disk(plan, self.room_bytes)


def in_few_blocks(plan: Plan) -> Plan:
    """Return a plan in blocks of little host memory: at most an eighth above the least."""
    room_bytes = 2**16
    while True:
        for found in InBlocks(room_bytes).of(plan):
            return found
        room_bytes += room_bytes // 8


def share_in_memory(plan: Plan) -> float:
    """Return the share of what is not resident that the CPU can attend: what is on no disk."""
    tokens = plan.context_tokens or 0
    below, beside = plan.disk_tokens(tokens), tokens - plan.resident_tokens
    return min((tokens - below) / beside, 1.0) if below and beside > 0 else 1.0


def disk_bytes(plan: Plan, tokens: int) -> int:
    """Return the bytes that blocks on the disk take of `tokens` tokens in each row."""
    if not plan.disk_block_tokens:
        return 0
    below = plan.disk_tokens(tokens)
    return blocks_bytes(plan.shape, below, plan.disk_block_tokens, plan.batch)


def disk_read_bytes(plan: Plan, tokens: int) -> int:
    """Return the bytes that a decode step behind `tokens` tokens reads from the disk."""
    read = max(plan.disk_tokens(tokens) - plan.resident_tokens, 0)
    return plan.shape.host_kv_bytes(read, plan.batch)
