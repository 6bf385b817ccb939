"""What several GPUs leave to a disk below host memory, by layers or by heads."""

from collections.abc import Sequence
from dataclasses import dataclass

from headinfer.errors import MemoryPlanError
from headinfer.estimate.methods import MAX_CONTEXT_TOKENS
from headinfer.estimate.situation import Situation
from headinfer.plan.below_host import disk_read_bytes
from headinfer.plan.disk_blocks import all_with_disk
from headinfer.plan.host_room import HostRoom
from headinfer.plan.plan import Plan


@dataclass(frozen=True, slots=True, kw_only=True)
class BelowHost:
    """A split of KV between host memory and a disk, of all GPUs together.

    Attributes:
        plans: of each GPU, with its blocks.
        kv_disk_bytes: on the disk.
        disk_read_bytes: of that, what a decode step reads.
        disk_short_bytes: space on the disk that is lacking.
        max_context_tokens: the longest context that memory and disk hold.
    """

    plans: tuple[Plan, ...]
    kv_disk_bytes: int
    disk_read_bytes: int
    disk_short_bytes: int
    max_context_tokens: int


def below_host(situation: Situation, plans: Sequence[Plan], processes: int) -> BelowHost | None:
    """Return what lies on the disk; None where there is none, or no room for any block.

    Args:
        situation: of one GPU; its host memory and disk are what all of them share.
        plans: of each GPU.
        processes: that share both evenly: the ranks of heads, or one for all layers.
    """
    if situation.disk is None:
        return None
    each = HostRoom.of_machine(situation.host_memory_bytes // processes, situation.device)
    groups = [plans] if processes == 1 else [[plan] for plan in plans]
    try:
        found = [all_with_disk(group, each.kv_bytes) for group in groups]
    except MemoryPlanError:
        return None
    blocks, tokens = tuple(plan for group in found for plan in group), situation.context_tokens
    free_bytes, on_disk = situation.disk.free_bytes, _disk_bytes(blocks, tokens)
    return BelowHost(
        plans=blocks,
        kv_disk_bytes=on_disk,
        disk_read_bytes=sum(disk_read_bytes(situation.in_answer(plan), tokens) for plan in blocks),
        disk_short_bytes=max(on_disk - free_bytes, 0),
        max_context_tokens=_longest(blocks, free_bytes),
    )


def _disk_bytes(plans: Sequence[Plan], tokens: int) -> int:
    return sum(plan.disk_bytes(tokens) for plan in plans)


def _longest(plans: Sequence[Plan], free_bytes: int) -> int:
    """Return the most tokens whose oldest ones the disk has room for."""
    low, high = 0, MAX_CONTEXT_TOKENS
    while high - low > 1:
        middle = (low + high) // 2
        fits = _disk_bytes(plans, middle) <= free_bytes
        low, high = (middle, high) if fits else (low, middle)
    return low
