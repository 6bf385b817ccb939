"""Budgets, plans, engines and caches of one attached model."""

import contextlib
import functools
import os
from collections.abc import Sequence

import torch
import transformers
from transformers import PreTrainedModel

from headinfer.device.base import Device, Mark
from headinfer.device.marks import AllMarks
from headinfer.engine.busy import BusyTimes
from headinfer.engine.parted import CacheEngine
from headinfer.engine.stats import Stats
from headinfer.errors import CacheStateError, MemoryPlanError, UnsupportedModelError
from headinfer.integration.answer_room import AnswerRoom
from headinfer.integration.assistants import Assistants
from headinfer.integration.attachment import Attachment
from headinfer.integration.attention import AttentionFunctions
from headinfer.integration.autocast import attended_dtype
from headinfer.integration.cache import OffloadedCache, PrefillProgress
from headinfer.integration.cache_engines import EnginesOfCaches
from headinfer.integration.capture import CapturedSteps
from headinfer.integration.disk_below import DiskBelow
from headinfer.integration.faster import faster_parts
from headinfer.integration.host_format import with_host_format, with_open_form
from headinfer.integration.memory_held import described_together
from headinfer.integration.model_shape import model_shape
from headinfer.integration.parts import (
    bytes_left,
    making_room,
    parts_of,
    planned_together,
    whole_together,
)
from headinfer.integration.placement import Placement
from headinfer.integration.room import RoomOfCaches
from headinfer.integration.saving import fill_cache
from headinfer.integration.shards import rank_shape, ranks_of, tell_of_ranks
from headinfer.plan.format import Format
from headinfer.plan.host_room import HostRoom
from headinfer.plan.narrow import with_fewer_residents
from headinfer.plan.options import Options
from headinfer.plan.plan import Plan
from headinfer.plan.streaming import with_pattern
from headinfer.saved.fingerprint import Fingerprint, fingerprint

_FUSED = frozenset({torch.float16, torch.bfloat16})
"""Dtypes in which fused parts of a model round less often than those of its code."""


class Session:
    """A model's attachment with all that its caches share, until `detach`.

    It serves the model's calls (`AttachmentOwner`) and its caches (`CacheHost`). Users hold an
    `Offload`; the model itself holds the session. Threads use the model with caches of their own:
    their calls take turns, first come first served.

    Args:
        model: supported and not attached.
        placement: where it computes.
        devices: of each layer that attends; the attachment's own.
        options: as the user gave them.
        progress: told of prefill; None for nobody.

    Attributes:
        parts: the layers of each device.
        device: where attention of the first of them is computed.
        plan: what was chosen for one row; each cache resolves its own for its rows and length.
        stats: what was measured since the attachment.
        busy: a watch on where the chunks of a prompt are.
        ranks: the processes that compute the model; each has a session of its own.
        assistants: of the answers that are under way, for plans to count.
        disk: below host memory, where one is.
        answers: memory of prompts' activations, which one cache may have while it answers.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        placement: Placement,
        devices: Sequence[Device],
        options: Options,
        *,
        progress: PrefillProgress | None,
    ) -> None:
        self._model, self._progress = model, progress
        self.ranks, self.stats, self.assistants = ranks_of(model), Stats(), Assistants()
        whole = with_pattern(model_shape(model), options)
        shape = rank_shape(whole, model, self.ranks)
        options = with_open_form(shape, options, devices, model.dtype, self.ranks.size)
        self._shape = with_host_format(shape, options, devices[0], model.dtype)
        self.parts = parts_of(self._shape, placement, devices, options, self.ranks.on_host)
        device = self.device = self.parts[0].device
        all_devices = [part.device for part in self.parts]
        self._room = RoomOfCaches(all_devices, self.ranks, options.host_memory_bytes)
        self.busy = BusyTimes(all_devices)
        self.disk = DiskBelow(options, self._shape, self.parts, self.ranks)
        self._engines = EnginesOfCaches(self._shape, self.parts, self.stats, self.busy)
        self.answers = AnswerRoom(self.parts, self._engines, self.assistants.on)
        self._attached = False
        self.plan = self._resolve(1, None, [], model.dtype)
        fast = options.fuse == "auto" and model.dtype in _FUSED
        captures = self._captures = CapturedSteps(
            *(model, all_devices, self.stats),
            enabled=options.capture,
            fused=fast and device.name == "cuda" and self.ranks.size == 1,
            obstacle=placement.obstacle,
            ranks=self.ranks,
        )
        faster = faster_parts(model, device, enabled=fast)
        padded = whole.exact is whole  # sinks of streaming heads would be padding
        self._attachment = Attachment(model, self, captures, faster, padded=padded)
        self._attached = True
        tell_of_ranks(self.ranks)

    @property
    def functions(self) -> AttentionFunctions:
        """The attention and mask functions of this attachment."""
        return self._attachment.functions

    def new_cache(self, max_tokens: int | None = None) -> OffloadedCache:
        """Return an empty cache, with host memory for so many tokens or by its prompts.

        Raises:
            CacheStateError: the model was detached.
        """
        if not self._attached:
            raise CacheStateError("the model was detached; attach it again for a new cache")
        return OffloadedCache(self._model, self, max_tokens)

    def load_cache(
        self, path: str | os.PathLike[str], max_tokens: int | None, *, partial: bool
    ) -> OffloadedCache:
        """Return a cache with the tokens of a saved session; see `Offload.load_cache`."""
        cache = self.new_cache(max_tokens)
        model = self.fingerprint()
        self._attachment.turns.run(lambda: fill_cache(cache, model, path, partial=partial))
        return cache

    def fingerprint(self) -> Fingerprint:
        """Return what the model is known by, where its sessions can be saved."""
        if self.ranks.size > 1 or len(self.parts) > 1:
            raise UnsupportedModelError(
                "sessions are saved of models on one device in one process; this one is split"
            )
        return fingerprint(self._model, transformers.__version__)

    def described(self) -> str:
        """Return the model and what its caches hold in words, without waiting for a call."""
        if not self._attached:
            return f"{self._shape.name}, detached"
        held = described_together(self._engines, self._shape.host_format)
        return f"{self._shape.name}, attached, {held}"

    @property
    def goes_back(self) -> bool:
        """Whether caches can be cropped to any length: no layer has a window or a state."""
        return self._shape.goes_back

    def goes_on_alike(self) -> bool:
        """Return whether a prompt gives the same if its beginning was read in another call."""
        return self._attachment.goes_on_alike()

    def detach(self) -> None:
        """Leave the model exactly as it was; its caches are closed. May be called again.

        Waits for the call of another thread.

        Raises:
            CacheStateError: called from within a call of the model.
        """
        self._attachment.between_calls(self._detach)

    def _detach(self) -> None:
        self._attachment.remove()
        self._attached = False
        with contextlib.ExitStack() as closing:  # all of them, also where one raises
            closing.callback(self.disk.close)
            closing.callback(self._room.close)
            closing.callback(self._engines.close)

    def plan_for(
        self,
        batch: int,
        context_tokens: int,
        *,
        replacing: CacheEngine | None = None,
        sharing: CacheEngine | None = None,
        dtype: torch.dtype | None = None,
    ) -> Plan:
        """Return the plan of a cache with so many rows and tokens; refuse what does not fit.

        What other caches keep resident is given up where nothing would fit otherwise. Their calls
        pass fewer tokens at once where their activations do not fit beside the new plan.

        Args:
            batch: rows.
            context_tokens: tokens expected.
            replacing: the cache's engine, if it has one, whose memory the plan may use again.
            sharing: the engine of which the cache is to be a copy.
            dtype: of keys and values; by default that of `replacing`, or of a new cache here.
        """
        if not self._attached:
            raise CacheStateError("the model was detached; attach it again for a new cache")
        engines = list(self._engines)
        others = [each for each in engines if not (each is replacing or each.closed or each.parked)]
        self.answers.clear()
        dtype = dtype or (self.kv_dtype() if replacing is None else replacing.dtype)
        room = functools.partial(self.host_room, self.plan.activation_bytes)
        form = before.plan.shape.host_format if (before := replacing or sharing) else None
        given = batch, context_tokens, others, dtype, replacing, form
        resolve = functools.partial(self._resolve, *given)
        try:
            plan = self.disk.chosen(resolve, room, replacing, engines)
        except MemoryPlanError:
            keeping = [each for each in others if any(part.can_give_up for part in each.parts)]
            if not self.ranks.any(bool(keeping)):
                raise
            for engine in keeping:
                engine.give_up_residents()
            plan = self.disk.chosen(resolve, room, replacing, engines)
        plan = making_room(plan, [engine.parts for engine in others])
        left = functools.partial(self.host_room, plan.activation_bytes)
        return self.disk.planned(plan, left, replacing, engines, sharing)

    def _resolve(
        self,
        batch: int,
        context_tokens: int | None,
        others: list[CacheEngine],
        dtype: torch.dtype,
        replacing: CacheEngine | None = None,
        form: Format | None = None,
        disk_room_bytes: int | None = None,
    ) -> Plan:
        """Return a plan that fits; where it fits on some ranks alone, none has one."""
        plan = self.ranks.together(
            lambda: planned_together(
                *(self.parts, self._shape, batch, context_tokens),
                [engine.parts for engine in others],
                *(dtype, self.assistants.on, disk_room_bytes),
                *(replacing.parts if replacing else (), form),
            )
        )
        # When a cache has outgrown its residents, all ranks plan anew.
        return with_fewer_residents(plan, *self.ranks.least(plan.resident_tokens))

    @property
    def max_positions(self) -> int:
        """Tokens that the model's position encoding was made for; 0 where that is not known."""
        return self._shape.max_positions

    def check_device(self, tokens: int) -> None:
        """Refuse, by a `MemoryPlanError`, a cache of one row that the devices alone do not hold."""
        self._resolve(1, tokens, [], self.kv_dtype(), form=self._shape.host_format)

    def kv_dtype(self, computed: torch.dtype | None = None) -> torch.dtype:
        """Return the dtype of keys and values under the autocast that is on here.

        Args:
            computed: in which the model computes them; its own dtype by default.
        """
        return attended_dtype(computed or self._model.dtype, self.device.torch_device.type)

    def make_engine(self, plan: Plan, dtype: torch.dtype, *, parked: bool = False) -> CacheEngine:
        """Return an engine for a cache of keys and values in a dtype."""
        return self._engines.make(plan, dtype, parked=parked, file=self.disk.file)

    def host_room(self, working_bytes: int) -> HostRoom:
        """Return what of host memory is left for a cache, beside what a call computes with."""
        return self._room.left(list(self._engines), working_bytes)

    def missing_host_bytes(self, cache: OffloadedCache, tokens: int) -> int:
        """Return the bytes of host memory that a cache of one row lacks for so many tokens."""
        engine = cache.state.engine
        return self.host_bytes_for(tokens) if engine is None else engine.missing_bytes(tokens)

    def host_bytes_for(self, tokens: int) -> int:
        """Return the bytes of host memory that a new cache of one row cannot do without."""
        return self.disk.host_bytes(self.plan, tokens)

    def check_host_room(self, needed_bytes: int, working_bytes: int, what: str) -> None:
        """Refuse KV that host memory has no room for, on all ranks if on one.

        Args:
            needed_bytes: bytes of KV to come.
            working_bytes: as in `host_room`.
            what: what needs them, for the message.

        Raises:
            MemoryPlanError: there is no room.
        """
        room = self.host_room(working_bytes)
        self.ranks.together(lambda: room.check(needed_bytes, what))

    def tensor_bytes_left(self, layer_idx: int) -> int:
        """Return the bytes that tensors may still take where a layer is."""
        (device,) = (part.device for part in self.parts if layer_idx in part.layers)
        return bytes_left(device)

    def owns(self, cache: OffloadedCache) -> bool:
        """Whether a cache was made here."""
        host: object = cache.state.host
        return host is self

    def chunk_tokens(self, cache: OffloadedCache) -> int:
        """Return the tokens of a chunk under a cache's plan."""
        return cache.state.chunk_tokens or self.plan.chunk_tokens

    def plan_whole(self, cache: OffloadedCache, batch: int, tokens: int) -> Plan:
        """Make room on the device for a call whose tokens all pass at once; return the new plan.

        Raises:
            MemoryPlanError: the device memory does not hold the activations of so many tokens.
        """
        return whole_together(self.parts, self.plan, cache.state.engine, batch, tokens, self.ranks)

    @property
    def stages(self) -> int:
        """Devices that a chunk passes through, one after the other."""
        return len(self.parts)

    def mark_compute(self) -> Mark:
        """Return a mark behind the model's work so far."""
        marks = [part.device.mark_compute() for part in self.parts]
        return marks[0] if len(marks) == 1 else AllMarks(marks)

    def finish_compute(self) -> None:
        """Block until the model's work on the devices is done, and raise what failed in it."""
        for part in self.parts:
            part.device.finish_compute()
        self._engines.check()

    def report_prefill(self, done_tokens: int, all_tokens: int) -> None:
        """Pass progress on."""
        self._captures.expect_steps(more_chunks=done_tokens < all_tokens)
        if self._progress is not None:
            self._progress(done_tokens, all_tokens)

    def after_call(self, cache: OffloadedCache) -> None:
        """Note the memory held after a model call, whose work may still go on."""
        self._captures.expect_steps()
        self.note_memory(cache)

    def note_memory(self, cache: OffloadedCache) -> None:
        """Note the memory that all caches hold, and what standard inference takes for one."""
        self._engines.note_memory(cache)
