"""What of host memory is left for the caches of an attachment, by what they have taken."""

from collections.abc import Hashable, Sequence

from headinfer.device.base import Device
from headinfer.device.host_memory import all_host_bytes, available_host_bytes
from headinfer.engine.parted import CacheEngine
from headinfer.plan.host_room import HostRoom
from headinfer.ranks.group import Ranks

_MOST_SPARE_BYTES = 2 * 2**30
"""What 16K tokens of Llama-3-8B take."""

_SPARE_SHARE = 1 / 16
"""Share of all host memory that is kept at most."""


class RoomOfCaches:
    """An account of the host memory that an attachment's caches may have.

    Devices keep some memory of caches that are gone, for the next ones. It counts as free.

    Args:
        devices: where attention is computed, the attachment's own.
        ranks: the processes that compute the model.
        given_bytes: the most that the caches of all processes here may take; None for no limit.
    """

    def __init__(self, devices: Sequence[Device], ranks: Ranks, given_bytes: int | None) -> None:
        self._devices, self._ranks = devices, ranks
        self._given_bytes = given_bytes
        owners = len(devices) * ranks.on_host
        self._all_bytes = all_host_bytes()
        spare_bytes = min(_MOST_SPARE_BYTES, int(self._all_bytes * _SPARE_SHARE)) // owners
        if given_bytes is not None and owners > 1:
            spare_bytes = 0  # what the others hold is not known
        for device in devices:
            device.keep_host_memory(spare_bytes, given_bytes)

    def left(self, engines: Sequence[CacheEngine], working_bytes: int) -> HostRoom:
        """Return what is left for a cache.

        Args:
            engines: of all caches. Memory that several of one row share counts once.
            working_bytes: what a call takes on the device beside KV, which may be host memory.
        """
        sharing, given_bytes = self._ranks.on_host, self._given_bytes
        # Locked memory is taken when it is locked; other memory, once it is written.
        locked = self._devices[0].name == "cuda"
        promised = sum(
            each.awaited_host_bytes if locked else each.unwritten_host_bytes for each in engines
        )
        spare = sum(device.spare_host_bytes for device in self._devices)
        # Whoever asks last sees what the others took before.
        (available,) = self._ranks.least(available_host_bytes() + spare)
        return HostRoom(
            device=self._devices[0].name,
            all_bytes=self._all_bytes // sharing,
            available_bytes=max(available // sharing - promised, 0),
            working_bytes=0 if locked else working_bytes,
            given_bytes=None if given_bytes is None else given_bytes // sharing,
            held_bytes=held_host_bytes(engines),
        )

    def close(self) -> None:
        """Keep no memory any more."""
        for device in self._devices:
            device.keep_host_memory(0, None)


def held_host_bytes(engines: Sequence[CacheEngine]) -> int:
    """Return the host memory that engines hold or asked for; what several share counts once."""
    pieces: dict[Hashable, int] = {}
    for engine in engines:
        pieces.update(engine.host_pieces())
    return sum(pieces.values()) + sum(engine.coming_host_bytes for engine in engines)
