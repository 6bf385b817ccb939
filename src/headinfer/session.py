"""Budgets, plans, engines and caches of one attached model."""

import contextlib
import dataclasses
import weakref

import torch
from transformers import PreTrainedModel

from headinfer.device.base import Device, Mark
from headinfer.device.host_memory import all_host_bytes, available_host_bytes
from headinfer.device.make import measured_hardware
from headinfer.engine.engine import Engine
from headinfer.engine.stats import Stats
from headinfer.errors import CacheStateError, MemoryPlanError, OptionError
from headinfer.integration.attachment import Attachment
from headinfer.integration.attention import AttentionFunctions
from headinfer.integration.autocast import attended_dtype
from headinfer.integration.cache import OffloadedCache, PrefillProgress
from headinfer.integration.capture import CapturedSteps
from headinfer.integration.linears import FewRowLinears
from headinfer.integration.model_shape import model_shape
from headinfer.plan import memory
from headinfer.plan.host_room import HostRoom
from headinfer.plan.narrow import narrowed
from headinfer.plan.options import Options
from headinfer.plan.plan import Plan
from headinfer.plan.resolve import resolve
from headinfer.plan.shape import ModelShape
from headinfer.plan.streaming import (
    check_streaming,
    pattern_of,
    with_streaming_heads,
)
from headinfer.plan.whole import passing_whole
from headinfer.units import format_bytes

_FUSED = frozenset({torch.float16, torch.bfloat16})
"""Dtypes in which fused parts of a model round less often than those of its code."""

_USED_SHARE = 0.9
"""Share of the free GPU memory that plans use.

The rest is left for fragments and for what the estimates leave out.
"""


class Session:
    """A model's attachment with all that its caches share, until `detach`.

    It serves the model's calls (`AttachmentOwner`) and its caches (`CacheHost`). Users hold an
    `Offload`; the model itself holds the session. Several threads may use the model, each with
    caches of its own: their calls take turns, first come first served.

    Args:
        model: supported and not attached.
        device: the attachment's own.
        options: as the user gave them.
        progress: told of prefill; None for nobody.

    Attributes:
        device: where attention is computed.
        plan: what was chosen for one row; each cache resolves its own for its rows and length.
        stats: what was measured since the attachment.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        device: Device,
        options: Options,
        *,
        progress: PrefillProgress | None,
    ) -> None:
        self.stats = Stats()
        self._model = model
        self.device = device
        self._options = options
        self._progress = progress
        self._shape = _with_pattern(model_shape(model), options)
        self._engines: weakref.WeakSet[Engine] = weakref.WeakSet()
        self._attached = False
        self._hardware = measured_hardware(device)
        self.plan = self._resolve(1, None, [], model.dtype)
        fast = options.fuse == "auto" and model.dtype in _FUSED
        captures = CapturedSteps(
            *(model, device, self.stats),
            enabled=options.capture,
            fused=fast and device.name == "cuda",
        )
        linears = FewRowLinears(model, enabled=fast and device.name == "cpu")
        padded = self._shape.exact is self._shape  # sinks of streaming heads would be padding
        self._attachment = Attachment(model, self, captures, linears, padded=padded)
        self._attached = True

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

    def detach(self) -> None:
        """Leave the model exactly as it was; its caches are closed. May be called again.

        Waits for the call of another thread.

        Raises:
            CacheStateError: called from within a call of the model.
        """
        self._attachment.turns.run(self._detach)

    def _detach(self) -> None:
        self._attachment.remove()
        self._attached = False
        with contextlib.ExitStack() as closing:  # all of them, also where one raises
            for engine in list(self._engines):
                closing.callback(engine.close)

    def plan_for(
        self,
        batch: int,
        context_tokens: int,
        *,
        replacing: Engine | None = None,
        dtype: torch.dtype | None = None,
    ) -> Plan:
        """Return the plan of a cache with so many rows and tokens; refuse what does not fit.

        What other caches keep resident is given up where nothing would fit otherwise. Their calls
        pass fewer tokens at once where their activations do not fit beside the new plan.

        Args:
            batch: rows.
            context_tokens: tokens expected.
            replacing: the cache's engine, if it has one, whose memory the plan may use again.
            dtype: of keys and values; by default that of `replacing`, or of a new cache here.
        """
        if not self._attached:
            raise CacheStateError("the model was detached; attach it again for a new cache")
        open_engines = [engine for engine in self._engines if not engine.closed]
        others = [engine for engine in open_engines if engine is not replacing]
        dtype = dtype or (self.kv_dtype() if replacing is None else replacing.dtype)
        try:
            plan = self._resolve(batch, context_tokens, others, dtype)
        except MemoryPlanError:
            if not any(engine.plan.resident_tokens for engine in others):
                raise
            for engine in others:
                if engine.plan.resident_tokens:
                    engine.give_up_residents()
            plan = self._resolve(batch, context_tokens, others, dtype)
        if plan.device_memory_bytes is not None:  # which leaves out what the others hold
            kept = plan.total_device_bytes - plan.activation_bytes
            for engine in others:
                engine.plan = narrowed(engine.plan, plan.device_memory_bytes - kept)
        return plan

    def _resolve(
        self, batch: int, context_tokens: int | None, others: list[Engine], dtype: torch.dtype
    ) -> Plan:
        asked, budget = self._options.device_memory_bytes, self._budget_bytes()
        left = budget
        if budget is not None:
            # What they may come to hold: windows are there only while they have tokens.
            left = max(budget - sum(engine.plan.kv_device_bytes for engine in others), 1)
        try:
            return resolve(
                self._shape_in(dtype),
                dataclasses.replace(self._options, device_memory_bytes=left),
                device=self.device.name,
                batch=batch,
                context_tokens=context_tokens,
                hardware=self._hardware,
            )
        except MemoryPlanError as error:
            if budget == asked:
                raise
            wanted = "" if asked is None else f", not the {format_bytes(asked)} asked for"
            raise MemoryPlanError(f"{error}; that is all the device has free{wanted}") from None

    def _shape_in(self, dtype: torch.dtype) -> ModelShape:
        """Return the model's shape with keys and values in a dtype."""
        computed = self._shape.kv_itemsize
        if dtype.itemsize == computed:
            return self._shape
        return dataclasses.replace(
            self._shape, kv_itemsize=dtype.itemsize, computed_itemsize=max(computed, dtype.itemsize)
        )

    def kv_dtype(self, computed: torch.dtype | None = None) -> torch.dtype:
        """Return the dtype of keys and values under the autocast that is on here.

        Args:
            computed: in which the model computes them; its own dtype by default.
        """
        return attended_dtype(computed or self._model.dtype, self._model.device.type)

    def _budget_bytes(self) -> int | None:
        """Return the device memory for weights, runtime, activations and all caches together.

        That is what was asked for as far as the device has it, or most of what is free. Weights
        and CUDA's context are there already and so not free; what caches hold counts as free.
        """
        asked, free = self._options.device_memory_bytes, self.device.free_bytes()
        if free is None:
            return asked
        free += sum(engine.device_kv_bytes for engine in self._engines)
        weights, runtime = self._shape.weights_bytes, memory.runtime_bytes(self.device.name)
        most = weights + runtime + int(free * _USED_SHARE)
        if asked is None:
            return most
        # The rest of the runtime, handles and fragments, is still to come out of what is free.
        return min(asked, max(most, weights + free))

    def make_engine(self, plan: Plan, dtype: torch.dtype) -> Engine:
        """Return an engine for a cache of keys and values in a dtype."""
        engine = Engine(self.device, plan, dtype, self.stats)
        self._engines.add(engine)
        return engine

    def host_room(self, working_bytes: int) -> HostRoom:
        """Return what of host memory is left for a cache.

        Args:
            working_bytes: what a call takes on the device beside KV, which may be host memory.
        """
        engines = list(self._engines)
        # Locked memory is taken when it is locked; other memory, once it is written.
        locked = self.device.name == "cuda"
        promised = sum(
            engine.awaited_host_bytes if locked else engine.unwritten_host_bytes
            for engine in engines
        )
        return HostRoom(
            device=self.device.name,
            all_bytes=all_host_bytes(),
            available_bytes=max(available_host_bytes() - promised, 0),
            working_bytes=0 if locked else working_bytes,
            given_bytes=self._options.host_memory_bytes,
            held_bytes=sum(engine.host_kv_bytes for engine in engines),
        )

    def tensor_bytes_left(self) -> int:
        """Return the bytes that tensors where the model is may still take."""
        free = self.device.free_bytes()
        return available_host_bytes() if free is None else int(free * _USED_SHARE)

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
        engine = cache.state.engine
        plan = dataclasses.replace(self.plan, batch=batch) if engine is None else engine.plan
        whole = passing_whole(plan, self._options, tokens)
        if engine is not None and whole.arena_bytes != plan.arena_bytes:
            engine.replan(whole)
        elif engine is not None:
            engine.plan = whole
        return whole

    def mark_compute(self) -> Mark:
        """Return a mark behind the model's work so far."""
        return self.device.mark_compute()

    def finish_compute(self) -> None:
        """Block until the model's work on the device is done, and raise what failed in it."""
        self.device.finish_compute()
        for engine in list(self._engines):
            engine.check()

    def report_prefill(self, done_tokens: int, all_tokens: int) -> None:
        """Pass progress on."""
        if self._progress is not None:
            self._progress(done_tokens, all_tokens)

    def after_call(self, cache: OffloadedCache) -> None:
        """Note the memory held after a model call, whose work may still go on."""
        device_bytes = host_bytes = 0
        standard_bytes = 0
        own = cache.state.engine
        for engine in list(self._engines):
            device_here, host_here = engine.device_kv_bytes, engine.host_kv_bytes
            device_bytes, host_bytes = device_bytes + device_here, host_bytes + host_here
            if engine is own:
                tokens, batch = cache.get_seq_length(), engine.plan.batch
                standard_bytes = self._shape.standard_kv_bytes(tokens, batch)
                _raise_peaks(cache.stats, device_here, host_here, standard_bytes)
        _raise_peaks(self.stats, device_bytes, host_bytes, standard_bytes)


def _with_pattern(shape: ModelShape, options: Options) -> ModelShape:
    """Return a model's shape with the heads that stream by the user's pattern, if any do."""
    check_streaming(options)
    if options.head_pattern is None:
        return shape
    pattern = pattern_of(options.head_pattern, shape)
    streaming = with_streaming_heads(shape, pattern, options)
    if streaming.exact is streaming:
        heads = sum(layer.kv_heads for layer in shape.full_layers)
        raise OptionError(
            f"sparsity {options.sparsity:g} of the {heads} KV heads that see all tokens is none of "
            "them; give a larger share, or 0 for none"
        )
    return streaming


def _raise_peaks(stats: Stats, device_bytes: int, host_bytes: int, standard_bytes: int) -> None:
    stats.peak_device_kv_bytes = max(stats.peak_device_kv_bytes, device_bytes)
    stats.host_kv_bytes = max(stats.host_kv_bytes, host_bytes)
    stats.standard_kv_bytes = max(stats.standard_kv_bytes, standard_bytes)
