"""The engines behind an attachment's caches, as long as their caches are there."""

import contextlib
import weakref
from collections.abc import Iterator, Sequence

import torch

from headinfer.disk.file import SpillFile
from headinfer.engine.busy import BusyTimes
from headinfer.engine.engine import Engine
from headinfer.engine.parted import CacheEngine, PartedEngine
from headinfer.engine.stats import Stats
from headinfer.integration.cache import OffloadedCache
from headinfer.integration.host_format import with_kv_dtype
from headinfer.integration.parts import ModelPart
from headinfer.plan.plan import Plan
from headinfer.plan.shape import ModelShape


class EnginesOfCaches:
    """A list of the engines that were made for an attachment's caches and are still there.

    Any thread may go through it, also while another one's call makes an engine.

    Args:
        shape: of the model, as its tokens lie in host memory.
        parts: the layers of each device.
        stats: what is measured of all caches.
        busy: told of the chunks of a prompt, where there are several devices.
    """

    def __init__(
        self, shape: ModelShape, parts: Sequence[ModelPart], stats: Stats, busy: BusyTimes
    ) -> None:
        self._shape, self._parts, self._stats, self._busy = shape, parts, stats, busy
        # Replaced and never changed, for threads that are going through it.
        self._made: tuple[weakref.ref[CacheEngine], ...] = ()

    def __iter__(self) -> Iterator[CacheEngine]:
        """Yield each."""
        return iter([engine for made in self._made if (engine := made()) is not None])

    def make(
        self, plan: Plan, dtype: torch.dtype, *, parked: bool, file: SpillFile | None
    ) -> CacheEngine:
        """Return an engine for a new cache.

        Args:
            plan: of the cache.
            dtype: of its keys and values.
            parked: whether it begins without an arena.
            file: takes what host memory has no room for; None where there is no disk.
        """
        engines = [
            Engine(part.device, own, dtype, self._stats, part.shares, parked=parked, file=file)
            for part, own in zip(self._parts, plan.of_devices, strict=True)
        ]
        engine: CacheEngine = engines[0]
        if len(engines) > 1:
            shape = with_kv_dtype(self._shape, dtype)
            layers = [part.layers for part in self._parts]
            engine = PartedEngine(shape, engines, layers, self._busy)
        self._made = (*(made for made in self._made if made() is not None), weakref.ref(engine))
        return engine

    def note_memory(self, cache: OffloadedCache) -> None:
        """Note the memory that all of them hold, and what standard inference takes for a cache."""
        device_bytes = host_bytes = standard_bytes = 0
        for engine in self:
            device_bytes += (device_here := engine.device_kv_bytes)
            host_bytes += (host_here := engine.host_kv_bytes)
            if engine is cache.state.engine:
                tokens = engine.parts[0].held_tokens  # which never raises
                standard_bytes = self._shape.standard_kv_bytes(tokens, engine.plan.batch)
                cache.stats.raise_peaks(device_here, host_here, standard_bytes)
        self._stats.raise_peaks(device_bytes, host_bytes, standard_bytes)

    def check(self) -> None:
        """Raise what the host's attention failed with in any since the last check."""
        for engine in self:
            engine.check()

    def close(self) -> None:
        """Close all of them, also where one raises."""
        with contextlib.ExitStack() as closing:
            for engine in self:
                closing.callback(engine.close)
