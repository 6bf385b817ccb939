"""A disk below the host memory of an attachment: where it may be, its file, and plans with it."""

import contextlib
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import TypeVar

from headinfer.disk.file import SpillFile
from headinfer.disk.folder import check_folder
from headinfer.disk.mount import free_bytes, mount_of
from headinfer.engine.parted import CacheEngine
from headinfer.errors import DiskError, HeadInferError, MemoryPlanError, OptionError
from headinfer.integration.cache import OffloadedCache
from headinfer.integration.parts import ModelPart
from headinfer.plan.below_host import above_disk, in_few_blocks
from headinfer.plan.host_room import HostRoom
from headinfer.plan.joining import joined
from headinfer.plan.options import Options
from headinfer.plan.plan import Plan
from headinfer.plan.resolve import least_plan
from headinfer.plan.shape import ModelShape
from headinfer.ranks.group import Ranks
from headinfer.units import counted, format_bytes

_Result = TypeVar("_Result")

_logger = logging.getLogger(__name__)


class DiskBelow:
    """A disk below host memory, for all caches of an attachment; or none, where none was given.

    Each rank has a file of its own, for the tokens of its heads. Ranks that have one ask the same
    in the same order, and all lower blocks where one lacks memory.

    Args:
        options: of the attachment.
        shape: of the model, as its tokens lie in host memory.
        parts: of the model.
        ranks: the processes that compute it.

    Attributes:
        file: takes what host memory has no room for; None where there is no disk.

    Raises:
        OptionError: a disk was given, and cannot be used here.
        DiskError: no file can be made there.
    """

    def __init__(
        self, options: Options, shape: ModelShape, parts: Sequence[ModelPart], ranks: Ranks
    ) -> None:
        self.file: SpillFile | None = None
        self._ranks = ranks
        self._least: Plan | None = None  # of one row, in as little host memory as there can be
        if options.disk_cache is None:
            return
        if parts[0].device.name == "cpu":
            if ranks.size == 1:  # ranks refuse a folder together, or not at all
                check_folder(options.disk_cache)
            raise OptionError(
                "disk_cache is for a GPU's cache; the CPU attends host memory, and has nothing "
                "below it"
            )
        self._folder = options.disk_cache
        self.file = ranks.together(lambda: SpillFile(self._folder))
        if (mount := mount_of(self._folder)).in_memory and not ranks.index:
            _logger.warning(
                "disk_cache %r is %s: what lies there takes CPU memory that host_memory does not "
                "count; name a folder on a disk",
                *(self._folder, mount.said),
            )
        if shape.kinds_of_full_layers:
            least = [
                least_plan(each.shape, each.options, device=each.device.name) for each in parts
            ]
            self._least = in_few_blocks(joined(shape, least))

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
        before = replacing or sharing
        parts = () if before is None else before.parts
        block_tokens = [part.plan.disk_block_tokens for part in parts]
        for room_bytes in self._rooms(room, replacing, engines):
            try:
                return self._ranks.together(partial(above_disk, plan, room_bytes, block_tokens))
            except MemoryPlanError as error:
                refusal = error
        raise refusal

    def chosen(
        self,
        resolve: Callable[[int | None], Plan],
        room: Callable[[], HostRoom],
        replacing: CacheEngine | None,
        engines: Iterable[CacheEngine],
    ) -> Plan:
        """Return a plan of sizes whose blocks there is room for; others lower theirs for that.

        Args:
            resolve: makes a plan for some host memory; None where there is no disk.
            room: returns what is left beside all caches.
            replacing: what the cache has already; None where it is new.
            engines: of all caches, between their calls.

        Raises:
            DiskError: the disk has no room for the blocks of others.
            MemoryPlanError: no plan fits the device.
        """
        if self.file is None:
            return resolve(None)
        for room_bytes in self._rooms(room, replacing, engines):
            plan = resolve(room_bytes)
            lacking = not plan.disk_block_tokens and bool(plan.shape.kinds_of_full_layers)
            if not self._ranks.any(lacking):
                break
        return plan

    def host_bytes(self, plan: Plan, tokens: int) -> int:
        """Return the host memory that a new cache cannot do without.

        Args:
            plan: of one row, without blocks.
            tokens: in it.
        """
        needed_bytes = plan.kv_host_bytes(tokens)
        if self._least is None:
            return needed_bytes
        return min(needed_bytes, self._least.kv_host_bytes(tokens))

    def check(self, tokens: int, room_bytes: int) -> None:
        """Refuse a prompt and its answer that host memory and the disk together never hold.

        Args:
            tokens: of both, in one row.
            room_bytes: host memory that its cache can have once all else has ended.

        Raises:
            MemoryPlanError: there is no room.
        """
        if self.file is None or self._least is None:
            return
        plan = above_disk(self._least, room_bytes)
        free = free_bytes(self._folder) + self.file.size_bytes  # what others have there, they free
        self._check_space(plan, tokens, free)

    def check_space(self, plan: Plan, tokens: int) -> None:
        """Refuse tokens of a new cache that host memory and the disk have no room for now.

        Each rank has its share of what is free on the disk.

        Args:
            plan: of the cache.
            tokens: that it is to hold in each row.

        Raises:
            MemoryPlanError: there is no room.
        """
        if self.file is not None:
            free = free_bytes(self._folder) // self._ranks.on_host + self.file.free_bytes
            self._ranks.together(partial(self._check_space, plan, tokens, free))

    def lower_to(self, engine: CacheEngine, plan: Plan) -> None:
        """Have a cache keep no more blocks in memory than a plan says.

        Raises:
            DiskError: the disk has no room for the others.
        """
        self._lowering(partial(_lower_to, engine, plan))

    def _lowering(self, work: Callable[[], _Result]) -> _Result:
        """Return what a function of this rank gives, unless the disk of any rank fails."""
        try:
            return self._ranks.together(work)
        except MemoryPlanError as error:  # of another rank, in its words
            raise DiskError(str(error)) from None

    def _check_space(self, plan: Plan, tokens: int, free: int) -> None:
        below_bytes = plan.disk_bytes(tokens)
        if below_bytes > free:
            raise MemoryPlanError(
                f"prompt and answer of {counted(tokens, 'token')} need {format_bytes(below_bytes)} "
                f"below CPU memory, and disk_cache {self._folder!r} has room for "
                f"{format_bytes(free)}; shorten the prompt, ask for fewer new tokens, free space "
                "or give more host_memory"
            )

    def close(self) -> None:
        """Give the file up, with no cache left."""
        if self.file is not None:
            self.file.close()

    def _rooms(
        self,
        room: Callable[[], HostRoom],
        replacing: CacheEngine | None,
        engines: Iterable[CacheEngine],
    ) -> Iterator[int]:
        """Yield the bytes that a cache can have, and again each time that others lower blocks.

        Args:
            room: returns what is left for it.
            replacing: what it has already; None where it is new.
            engines: of all caches, between their calls.

        Raises:
            DiskError: the disk has no room for the blocks of others.
        """
        held_bytes = 0 if replacing is None else replacing.taken_host_bytes
        others = [each for each in engines if each is not replacing]
        while True:
            yield room().kv_bytes + held_bytes
            lowered = self._lowering(partial(_lower_some, others))
            if not self._ranks.any(lowered):
                return


def _lower_some(engines: Sequence[CacheEngine]) -> bool:
    """Have caches keep fewer blocks in memory; return whether any could."""
    lowered = []
    for part in (part for each in engines for part in each.parts):
        with part.in_use():
            lowered.append(part.lower_blocks())
    return any(lowered)


def _lower_to(engine: CacheEngine, plan: Plan) -> None:
    for part, own in zip(engine.parts, plan.of_devices, strict=True):
        with part.in_use():
            part.keep_blocks(own.disk_host_blocks, own.disk_staging_bytes)


def take_back_failed(cache: OffloadedCache) -> None:
    """Have a cache be as it was before a pass that failed for want of memory or disk, if it can be.

    Where it cannot, as with windows and states, the cache refuses to go on.
    """
    engine, before = cache.state.engine, cache.lengths_before
    if engine is None or not engine.plan.disk_block_tokens or engine.closed:
        return
    with contextlib.suppress(HeadInferError):  # which would hide what failed first
        for part in engine.parts:
            with part.in_use():
                part.forget_ahead()
        if before is not None and engine.keeps_all(len(cache.layers)):
            engine.take_back(before)
            if engine.lengths() == before:  # else a change that follows would look like a half call
                cache.end_call()
