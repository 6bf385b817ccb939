"""HeadInfer, with the options that make it each of its methods."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from headinfer.api import attach
from headinfer.bench.catalogue import Spread
from headinfer.bench.held import Held, HeldPart
from headinfer.bench.spec import TrialSpec
from headinfer.bench.spreading import devices_of_layers
from headinfer.device.simulated import SimulatedDevice
from headinfer.engine.engine import Engine
from headinfer.errors import MemoryPlanError, OptionError
from headinfer.integration.cache import OffloadedCache
from headinfer.integration.calls import last_logits
from headinfer.integration.model_shape import model_shape
from headinfer.integration.shards import ranks_of
from headinfer.plan.below_host import disk_read_bytes, read_bytes
from headinfer.plan.narrow import for_prompts
from headinfer.plan.options import DECLARATIONS
from headinfer.plan.plan import Plan
from headinfer.plan.streaming import PAPERS_SPARSITY, RANDOM, STREAMING_OPTIONS
from headinfer.units import counted

_CPU_TILE_TOKENS = "16K"
"""Tile of `bounded` on the CPU, where tiles need no memory and so have no limit of their own."""

_UNMEASURED_HOST_SHARE = 0.5
"""Share of `host_attention` where `headinfer probe` has not measured which share is best."""

_HEADS = (8, 4, 2, 1)


_EXACT = {name: DECLARATIONS[name].default for name in STREAMING_OPTIONS}
"""Options with which no head streams: for all methods but one, whatever a run's settings are."""


class HeadInfer:
    """An attachment of HeadInfer to a model; options given here go before the run's settings."""

    def __init__(self, model: PreTrainedModel, spec: TrialSpec, **options: Any) -> None:
        self._model = model
        self._offload = attach(model, **(spec.settings.keywords() | _EXACT | options))
        self._check_form(spec.settings.kv_cache)
        told = [{"cpu": "tiles are views", "simulated": "simulated device"}.get(self.device, "")]
        form = self._offload.plan.shape.host_format
        if form.code is not None:
            told.append(f"approximate: KV rounded to {form.value} in CPU memory")
        self.note = ", ".join(filter(None, told))

    def _check_form(self, asked: str) -> None:
        """Detach and refuse where KV has another form in CPU memory than the trial asks for."""
        form = self._offload.plan.shape.host_format
        if asked not in ("auto", form.value):
            self.close()
            where = "the CPU attends it where it lies"
            why = f": {where}" if self.device == "cpu" else ", as the log says"
            raise OptionError(
                f"KV is {form.value} here and cannot be {asked}{why}; leave {asked} out of "
                "--kv-cache"
            )

    @property
    def device(self) -> str:
        """The kind of device it computes on."""
        return self._offload.plan.device

    @property
    def host_share(self) -> float:
        """Share of the streamed tokens that the CPU attends."""
        return self._offload.plan.host_share

    def new_cache(self, max_tokens: int) -> Cache:
        """Return an empty cache with its host memory reserved."""
        return self._offload.new_cache(max_tokens)

    def pass_tokens(self, context_tokens: int) -> int:
        """Return the tokens of a chunk."""
        return min(self._offload.session.plan_for(1, context_tokens).chunk_tokens, context_tokens)

    def prefill(self, tokens: torch.Tensor, cache: Cache) -> torch.Tensor:
        """Pass a prompt through the model, which is chunked by itself."""
        return last_logits(self._model, tokens, cache)

    def step(self, token: torch.Tensor, cache: Cache) -> torch.Tensor:
        """Pass one token through the model."""
        return last_logits(self._model, token, cache)

    def make_ready(self, token: torch.Tensor, cache: Cache) -> None:
        """Do what decode steps of a long answer find done.

        What a prompt has left to the next call is sent home, and the answer has its own plan.

        Args:
            token: that is passed next, `[1, 1]`.
            cache: with the prompt.
        """
        assert isinstance(cache, OffloadedCache)
        if cache.state.engine is not None:
            cache.state.engine.send_late()
            cache.state.begin_answer()

    def held(self, cache: Cache) -> Held:
        """Return the bytes of store and arena, and what a decode step does with them."""
        stats, plan = self._offload.stats, self._plan_of(cache)
        parts = tuple(self._parts(cache))
        streamed = sum(part.streamed_bytes for part in parts)
        return Held(
            host_bytes=stats.host_kv_bytes,
            device_bytes=stats.peak_device_kv_bytes,
            streamed_bytes=0 if self.device == "cpu" else streamed,
            host_attended_bytes=sum(part.host_attended_bytes for part in parts),
            unseen_bytes=self._unseen_bytes(plan, cache.get_seq_length()),
            format=plan.shape.host_format.value,
            raw_page_bytes=plan.raw_page_bytes,
            parts=parts,
            disk_bytes=plan.disk_bytes(cache.get_seq_length()),
            # A plan counts the newest tokens as sent home, and has a block more until they are.
            disk_read_bytes=sum(
                read_bytes(each.plan, each.disk_tokens) for each in _engines(cache)
            ),
        )

    def _parts(self, cache: Cache) -> Iterator[HeldPart]:
        """Yield what each device of this process has to do with the KV of a used cache."""
        assert isinstance(cache, OffloadedCache)
        tokens, engines = cache.get_seq_length(), _engines(cache) or (None,)
        busy = cache.stats.device_busy or (None,) * len(engines)
        plans = self._plan_of(cache).of_devices
        for plan, of_device, worked in zip(plans, engines, busy, strict=True):
            streamed = plan.streamed_bytes(tokens)
            share = self.host_share if of_device is None else of_device.host_share_at(1)
            in_memory = streamed - disk_read_bytes(plan, tokens)  # the CPU attends nothing else
            attended = min(int(streamed * share), in_memory)
            yield HeldPart(
                layers=len(plan.shape.attention_layers),
                kv_bytes=plan.shape.kv_bytes(tokens),
                streamed_bytes=streamed - attended,
                host_attended_bytes=attended,
                resident_tokens=plan.resident_tokens,
                prefill_busy=worked,
            )

    @staticmethod
    def _unseen_bytes(plan: Plan, tokens: int) -> int:
        shape = plan.shape
        return shape.standard_kv_bytes(tokens) - shape.seen_kv_bytes(tokens)

    def link_bytes(self) -> tuple[int, int]:
        """Return the bytes copied since the attachment."""
        stats = self._offload.stats
        return stats.bytes_to_device, stats.bytes_to_host

    def planned_activation_bytes(self, cache: Cache) -> int | None:
        """Return the plan's estimate."""
        return for_prompts(self._plan_of(cache)).activation_bytes

    def sizes(self, cache: Cache) -> dict[str, int] | None:
        """Return the sizes of the plan; a tile never split has the tokens of the cache."""
        plan = self._plan_of(cache)
        return {
            "chunk_tokens": for_prompts(plan).chunk_tokens,
            "tile_heads": plan.tile_heads,
            "tile_tokens": min(plan.tile_tokens, cache.get_seq_length()),
            "resident_tokens": plan.resident_tokens,
            "host_attended_percent": round(100 * self._share_of(cache)),
        }

    def check_fits(self, tokens: int) -> None:
        """Check that a cache of so many tokens can be planned, and packed where its plan packs.

        Raises:
            MemoryPlanError: it cannot.
        """
        self._offload.session.plan_for(1, tokens)

    def _plan_of(self, cache: Cache) -> Plan:
        """Return the plan of a cache that was used; a new one would reckon with what it holds."""
        assert isinstance(cache, OffloadedCache)
        return self._offload.plan if cache.state.engine is None else cache.state.engine.plan

    def _share_of(self, cache: Cache) -> float:
        """Return the host's share in a cache's newest step; what was planned may be corrected."""
        assert isinstance(cache, OffloadedCache)
        engine = cache.state.engine
        return self.host_share if engine is None else engine.host_share_at(1)

    def close(self) -> None:
        """Detach."""
        self._offload.detach()

    def refuse_on_cpu(self, reason: str) -> "HeadInfer":
        """Return itself, but detach and refuse where the CPU is the device.

        Raises:
            OptionError: with the reason.
        """
        if self.device == "cpu":
            self.close()
            raise OptionError(f"{reason}; --device simulated has a device beside the CPU")
        return self


def _engines(cache: Cache) -> tuple[Engine, ...]:
    """Return the engine of each device that a cache has tokens on; none before the first token."""
    assert isinstance(cache, OffloadedCache)
    engine = cache.state.engine
    return () if engine is None else tuple(engine.parts)


Factory = Callable[[PreTrainedModel, TrialSpec], HeadInfer]


def _papers(model: PreTrainedModel, spec: TrialSpec, heads: int) -> HeadInfer:
    """Return the paper's method: tiles of some heads x all tokens, nothing resident."""
    return HeadInfer(
        model,
        spec,
        tile_heads=heads,
        tile_tokens=spec.all_tokens,
        resident_tokens=0,
        host_attention="off",
    )


def head_wise(heads: int) -> Factory:
    """Return the paper's head=`heads`."""

    def factory(model: PreTrainedModel, spec: TrialSpec) -> HeadInfer:
        return _papers(model, spec, heads)

    return factory


def adaptive(model: PreTrainedModel, spec: TrialSpec) -> HeadInfer:
    """Return the paper's method with the most heads that fit this context (section 3.2)."""
    kv_heads = model_shape(model).kv_heads
    refusal = MemoryPlanError("the model has no KV to offload")
    for heads in dict.fromkeys(min(heads, kv_heads) for heads in _HEADS if kv_heads):
        try:
            method = _papers(model, spec, heads)
        except MemoryPlanError as error:
            refusal = error
            continue
        try:
            method.check_fits(spec.all_tokens)
        except MemoryPlanError as error:
            refusal = error
            method.close()
        else:
            return method
    raise refusal


def bounded(model: PreTrainedModel, spec: TrialSpec) -> HeadInfer:
    """Return tiles of a fixed number of tokens, of which none stay on the device."""
    options: dict[str, Any] = {"resident_tokens": 0, "host_attention": "off"}
    on_cpu = model.device.type == "cpu" and spec.settings.device != "simulated"
    if on_cpu and spec.settings.tile_tokens == "auto":
        options["tile_tokens"] = _CPU_TILE_TOKENS
    return HeadInfer(model, spec, **options)


def resident(model: PreTrainedModel, spec: TrialSpec, **options: Any) -> HeadInfer:
    """Return bounded tiles, with the oldest tokens kept on the device as far as they fit."""
    method = HeadInfer(model, spec, host_attention="off", **options)
    return method.refuse_on_cpu("nothing needs to be kept: on the CPU all KV is where it is used")


def fixed(model: PreTrainedModel, spec: TrialSpec) -> HeadInfer:
    """Return resident, with no more tokens kept in an answer than in its prompt."""
    planned = resident(model, spec)
    plan = planned._offload.session.plan_for(1, spec.all_tokens)
    planned.close()
    names = ("chunk_tokens", "tile_heads", "tile_tokens", "resident_tokens")
    return resident(model, spec, **{name: getattr(plan, name) for name in names})


def host_attention(model: PreTrainedModel, spec: TrialSpec, **options: Any) -> HeadInfer:
    """Return resident, with a share of the other tokens attended by the CPU in decode steps."""
    method = HeadInfer(model, spec, **options).refuse_on_cpu("the CPU attends everything already")
    if not ranks_of(model).any(not method.host_share):  # all ranks attach anew, or none does
        return method
    method.close()
    method = HeadInfer(model, spec, host_attention=_UNMEASURED_HOST_SHARE, **options)
    method.note = f"{method.note} half by the CPU: no probe measured which share is best".strip()
    return method


def spread(model: PreTrainedModel, spec: TrialSpec, *, host: bool) -> HeadInfer:
    """Return resident on one GPU or on several, as the trial's model lies on them.

    Args:
        model: the model, or this rank's part of it.
        spec: the trial.
        host: whether the CPU attends a share.
    """
    options: dict[str, Any] = {}
    if spec.spread is Spread.LAYERS and spec.settings.device == "simulated":
        places = devices_of_layers(spec.model.layers, spec.gpus)
        simulated = [SimulatedDevice(seed=number) for number in range(spec.gpus)]
        options["simulated_device"] = [simulated[number] for number in places]
    if host:
        return host_attention(model, spec, **options)
    method = HeadInfer(model, spec, host_attention="off", **options)
    if spec.spread is Spread.LAYERS:
        method.refuse_on_cpu("layers cannot be spread: there is one CPU")
    return method


def head_wise_sparse(model: PreTrainedModel, spec: TrialSpec) -> HeadInfer:
    """Return everything on auto, with heads that stream: by the run's settings, or half of them."""
    settings, written = spec.settings, spec.settings.keywords()
    options = {name: written[name] for name in STREAMING_OPTIONS}
    options["sparsity"] = settings.sparsity or PAPERS_SPARSITY
    options["head_pattern"] = settings.head_pattern or RANDOM
    method = HeadInfer(model, spec, **options)
    method.note = ", ".join(filter(None, (method.note, _streaming(**options))))
    return method


def _streaming(
    sparsity: float, head_pattern: str, sink_tokens: int | str, recent_tokens: int | str
) -> str:
    """Return which heads stream and what these see, where it is not the pattern's own reach."""
    is_random = head_pattern.partition(":")[0] == RANDOM
    pattern = "a random pattern" if is_random else Path(head_pattern).name
    told = [f"approximate: {sparsity:.0%} of KV heads stream, by {pattern}"]
    if isinstance(sink_tokens, int):
        told.append(counted(sink_tokens, "sink"))
    if isinstance(recent_tokens, int):
        told.append(counted(recent_tokens, "newest token"))
    return ", ".join(told)


def rounded(model: PreTrainedModel, spec: TrialSpec, *, kv_cache: str) -> HeadInfer:
    """Return bounded tiles whose tokens lie in host memory in 8 bits, so that all are rounded."""
    method = HeadInfer(model, spec, kv_cache=kv_cache, resident_tokens=0, host_attention="off")
    return method.refuse_on_cpu("nothing is rounded: on the CPU all KV is attended where it lies")


def synchronous(model: PreTrainedModel, spec: TrialSpec) -> HeadInfer:
    """Return HeadInfer with everything on auto but overlap."""
    method = HeadInfer(model, spec, overlap=False)
    return method.refuse_on_cpu("nothing is copied, so nothing can overlap")
