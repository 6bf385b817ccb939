"""What of host memory is left for the caches of an attachment, by what they have taken."""

from collections.abc import Hashable, Sequence

from headinfer.device.base import Device
from headinfer.device.host_memory import all_host_bytes, available_host_bytes
from headinfer.engine.parted import CacheEngine
from headinfer.plan.host_room import HostRoom
from headinfer.ranks.group import Ranks


def room_of(
    engines: Sequence[CacheEngine],
    device: Device,
    ranks: Ranks,
    given_bytes: int | None,
    working_bytes: int,
) -> HostRoom:
    """Return what of host memory is left for a cache.

    Args:
        engines: of all caches. Memory that several of one row share counts once.
        device: where attention is computed.
        ranks: the processes that compute the model.
        given_bytes: the most that the caches of all processes here may take; None for no limit.
        working_bytes: what a call takes on the device beside KV, which may be host memory.
    """
    sharing = ranks.on_host
    # Locked memory is taken when it is locked; other memory, once it is written.
    locked = device.name == "cuda"
    promised = sum(
        each.awaited_host_bytes if locked else each.unwritten_host_bytes for each in engines
    )
    # Whoever asks last sees what the others took before.
    (available,) = ranks.least(available_host_bytes())
    return HostRoom(
        device=device.name,
        all_bytes=all_host_bytes() // sharing,
        available_bytes=max(available // sharing - promised, 0),
        working_bytes=0 if locked else working_bytes,
        given_bytes=None if given_bytes is None else given_bytes // sharing,
        held_bytes=held_host_bytes(engines),
    )


def held_host_bytes(engines: Sequence[CacheEngine]) -> int:
    """Return the host memory that engines hold or asked for; what several share counts once."""
    pieces: dict[Hashable, int] = {}
    for engine in engines:
        pieces.update(engine.host_pieces())
    return sum(pieces.values()) + sum(engine.coming_host_bytes for engine in engines)
