"""A disk below the host memory of an attachment: where it may be, its file, and plans with it."""

import contextlib
from collections.abc import Callable, Iterable

from headinfer.device.base import Device
from headinfer.disk.file import SpillFile
from headinfer.engine.engine import Engine
from headinfer.engine.parted import CacheEngine
from headinfer.errors import HeadInferError, MemoryPlanError, OptionError
from headinfer.integration.cache import OffloadedCache
from headinfer.plan.disk_blocks import with_disk
from headinfer.plan.host_room import HostRoom
from headinfer.plan.options import Options
from headinfer.plan.plan import Plan
from headinfer.plan.shape import ModelShape


class DiskBelow:
    """A disk below host memory, for all caches of an attachment; or none, where none was given.

    Args:
        options: of the attachment.
        shape: of the model, as its tokens lie in host memory.
        devices: how many the layers lie on.
        device: the first of them.
        ranks: processes that compute the model.

    Attributes:
        file: takes what host memory has no room for; None where there is no disk.

    Raises:
        OptionError: a disk was given, and cannot be used here.
        DiskError: no file can be made there.
    """

    def __init__(
        self, options: Options, shape: ModelShape, devices: int, device: Device, ranks: int
    ) -> None:
        self.file: SpillFile | None = None
        if options.disk_cache is None:
            return
        split = devices > 1 or ranks > 1
        refusal = _refusal(options, shape, device.name, split=split)
        if refusal is not None:
            raise OptionError(f"disk_cache {refusal}")
        self.file = SpillFile(options.disk_cache)

    def planned(
        self,
        plan: Plan,
        room: Callable[[], HostRoom],
        replacing: CacheEngine | None,
        engines: Iterable[CacheEngine],
        sharing: CacheEngine | None = None,
    ) -> Plan:
        """Return a plan with its blocks; where there is no room for it, others lower theirs.

        Args:
            plan: of a cache.
            room: returns what is left for it.
            replacing: what it has already; None where it is new.
            engines: of all caches, between their calls.
            sharing: whose blocks it is to hold; None where it has none of another.

        Raises:
            DiskError: the disk has no room for the blocks of others.
            MemoryPlanError: there is too little host memory.
        """
        if self.file is None:
            return plan
        held_bytes = 0 if replacing is None else replacing.taken_host_bytes
        others = [part for each in engines if each is not replacing for part in each.parts]
        before = replacing or sharing
        block_tokens = 0 if before is None else before.plan.disk_block_tokens
        while True:
            try:
                return with_disk(plan, room().kv_bytes + held_bytes, block_tokens)
            except MemoryPlanError:
                lowered = [other.lower_blocks() for other in others]
                if not any(lowered):
                    raise

    def close(self) -> None:
        """Give the file up, with no cache left."""
        if self.file is not None:
            self.file.close()


def _refusal(options: Options, shape: ModelShape, device: str, *, split: bool) -> str | None:
    """Say why there can be no disk below; None where there can."""
    if device == "cpu":
        return "is for a GPU's cache; the CPU attends host memory, and has nothing below it"
    if split:
        return "serves a model on one device in one process; this one is split"
    if shape.packs:
        return f"takes dense tokens alone; leave out kv_cache={options.kv_cache}"
    if options.draft_tokens != 0:
        return "cannot be combined with draft_tokens; draft with another model, or by prompt lookup"
    return None


def take_back_failed(cache: OffloadedCache) -> None:
    """Have a cache be as it was before a pass that failed for want of memory or disk, if it can be.

    Where it cannot, as with windows and states, the cache refuses to go on.
    """
    engine, before = cache.state.engine, cache.lengths_before
    if not isinstance(engine, Engine) or not engine.plan.disk_block_tokens or engine.closed:
        return
    if before is not None and engine.keeps_all(len(cache.layers)):
        with contextlib.suppress(HeadInferError):  # which would hide what failed first
            engine.take_back(before)
