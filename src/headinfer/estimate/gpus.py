"""What a model takes on several GPUs, and for how long: by layers, by heads, and on one of them."""

import enum
from collections.abc import Sequence
from dataclasses import dataclass, replace

from headinfer.errors import OptionError
from headinfer.estimate.methods import RESIDENT, STANDARD, papers_methods
from headinfer.estimate.situation import MethodPlan, Situation
from headinfer.estimate.split_disk import below_host
from headinfer.estimate.split_times import heads_times, layers_times, shared_hardware
from headinfer.estimate.spread import Share, Spread, by_heads, by_layers, heads_obstacle
from headinfer.plan.hardware import Hardware
from headinfer.plan.host_room import HostRoom, machine_bytes_for
from headinfer.plan.plan import Plan
from headinfer.plan.shape import ModelShape
from headinfer.plan.step_time import Placement

_WHOLE = "--load-in quantises whole matrices, which ranks do not have"
_ON_GPUS = "--load-in keeps no weights in CPU memory, and GPU memory does not hold them"


class Split(str, enum.Enum):
    """What of a model each of several GPUs has."""

    NONE = "none"
    LAYERS = "layers"
    HEADS = "heads"


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuUse:
    """A use of one GPU's memory, and of its time in a prefill.

    Attributes:
        layers: that it computes.
        kv_heads: of a layer, as many as it has.
        weights_bytes: on it, with a layer of those that are brought.
        brought_bytes: weights that are brought to it each time that tokens pass.
        disk_bytes: of these, what is read from a disk.
        kv_device_bytes: KV on it.
        resident_bytes: of that, what is never streamed.
        activation_bytes: the most that activations take.
        runtime_bytes: what CUDA takes beside all that.
        short_bytes: memory it lacks; 0 where all fits.
        busy: share of the prefill in which it works.
    """

    layers: int
    kv_heads: int
    weights_bytes: int
    brought_bytes: int
    disk_bytes: int
    kv_device_bytes: int
    resident_bytes: int
    activation_bytes: int
    runtime_bytes: int
    short_bytes: int
    busy: float = 1.0

    @property
    def total_bytes(self) -> int:
        """All of it."""
        used = self.weights_bytes + self.kv_device_bytes + self.activation_bytes
        return used + self.runtime_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitPlan:
    """A plan of one method on some GPUs, or why there is none.

    Attributes:
        method: standard inference, or ours with residents.
        gpus: how many.
        split: what each has.
        obstacle: why it cannot be, in words; then all else is 0. None where it can.
        uses: of each GPU.
        chunk_tokens: tokens of a prefill chunk; None for the whole prompt at once.
        kv_host_bytes: KV in host memory.
        kv_home_bytes: KV that lies there, or on a disk below.
        kv_disk_bytes: of that, what lies on the disk.
        disk_read_bytes: of that, what a decode step reads.
        disk_short_bytes: space on the disk that it lacks.
        weights_host_bytes: weights that stay there.
        host_short_bytes: host memory it lacks.
        max_context_tokens: the longest context that the memories hold; None for no limit.
        prefill_s: predicted seconds of the prefill.
        decode_s_per_token: predicted seconds of a decode step.
        reduce_s: of a step, what the ranks take to add up their results.
    """

    method: str
    gpus: int
    split: Split
    obstacle: str | None = None
    uses: tuple[GpuUse, ...] = ()
    chunk_tokens: int | None = None
    kv_host_bytes: int = 0
    kv_home_bytes: int = 0
    kv_disk_bytes: int = 0
    disk_read_bytes: int = 0
    disk_short_bytes: int = 0
    weights_host_bytes: int = 0
    host_short_bytes: int = 0
    max_context_tokens: int | None = 0
    prefill_s: float = 0.0
    decode_s_per_token: float = 0.0
    reduce_s: float = 0.0

    @property
    def fits(self) -> bool:
        """Whether all memories hold it."""
        short = any(use.short_bytes for use in self.uses)
        short = short or bool(self.host_short_bytes or self.disk_short_bytes)
        return self.obstacle is None and not short

    @property
    def fullest(self) -> GpuUse:
        """The GPU that lacks most, or has least left."""
        return max(self.uses, key=lambda use: (use.short_bytes, use.total_bytes))

    @property
    def streamed_bytes(self) -> int:
        """KV that crosses the links in a decode step, unless the CPU attends it; of all GPUs."""
        return self.kv_home_bytes - sum(use.resident_bytes for use in self.uses)

    @property
    def brought_bytes(self) -> int:
        """Weights that cross a link each time that tokens pass."""
        return sum(use.brought_bytes for use in self.uses)

    @property
    def disk_bytes(self) -> int:
        """What is read from a disk before it crosses a link."""
        return sum(use.disk_bytes for use in self.uses)


def split_plans(
    situation: Situation, memory_bytes: Sequence[int], *, quantising: bool = False
) -> list[SplitPlan]:
    """Return standard inference and ours on one GPU, and on all of them by layers and by heads.

    Args:
        situation: of one GPU; its host memory is what all of them share.
        memory_bytes: the most to use of each GPU.
        quantising: whether weights are quantised as they are loaded.

    Raises:
        OptionError: the model has fewer layers than there are GPUs.
    """
    shape, gpus = situation.shape, len(memory_bytes)
    if gpus > len(shape.layers):
        raise OptionError(
            f"there are {gpus} GPUs, and {shape.name} has {len(shape.layers)} layers; give at most "
            "as many GPUs"
        )
    one = memory_bytes[:1]
    plans = _by_layers(situation, Split.NONE, one, quantising=quantising)
    if gpus == 1:
        return plans
    plans += _by_layers(situation, Split.LAYERS, memory_bytes, quantising=quantising)
    obstacle = _WHOLE if quantising else heads_obstacle(shape, gpus)
    if obstacle is None:
        plans += _both(situation, Split.HEADS, by_heads(shape, memory_bytes))
    else:
        plans.append(SplitPlan(method=RESIDENT, gpus=gpus, split=Split.HEADS, obstacle=obstacle))
    return plans


def _by_layers(
    situation: Situation, split: Split, memory_bytes: Sequence[int], *, quantising: bool
) -> list[SplitPlan]:
    spread = by_layers(situation.shape, memory_bytes, quantising=quantising)
    if quantising and spread.host_bytes:
        gpus = len(memory_bytes)
        return [SplitPlan(method=RESIDENT, gpus=gpus, split=split, obstacle=_ON_GPUS)]
    if not spread.host_bytes:
        return _both(situation, split, spread)
    # CPU memory has KV first: what it does not hold of the weights can lie on a disk.
    room = HostRoom.of_machine(situation.host_memory_bytes, situation.device).kv_bytes
    kv_bytes = situation.shape.kv_bytes(situation.context_tokens, situation.batch)
    beside_none, beside_kv = (
        by_layers(situation.shape, memory_bytes, host_bytes=max(room - taken, 0))
        for taken in (0, kv_bytes)
    )
    return [_standard(situation, split, beside_none), _resident(situation, split, beside_kv)]


def _both(situation: Situation, split: Split, spread: Spread) -> list[SplitPlan]:
    return [_standard(situation, split, spread), _resident(situation, split, spread)]


def _standard(situation: Situation, split: Split, spread: Spread) -> SplitPlan:
    """Return stock transformers' way: all KV in GPU memory, the prompt in one piece."""
    here = [_of_share(situation, share) for share in spread.shares]
    plans = [next(papers_methods(each)) for each in here]
    lengths = [plan.max_context_tokens for plan in plans if plan.max_context_tokens is not None]
    return _split_plan(
        situation,
        (STANDARD, split, spread),
        [_use(each, plan) for each, plan in zip(here, plans, strict=True)],
        [Placement(batch=situation.batch)] * len(here),
        kv_host_bytes=0,
        max_context_tokens=min(lengths, default=None),
    )


def _resident(situation: Situation, split: Split, spread: Spread) -> SplitPlan:
    """Return ours: KV in host memory, and on each GPU what fits."""
    ranks = len(spread.shares)
    processes = ranks if split is Split.HEADS else 1
    hardware = shared_hardware(situation.hardware, ranks) if split is Split.HEADS else None
    here = [_of_share(situation, share, hardware) for share in spread.shares]
    if split is Split.HEADS:
        memory_bytes = situation.host_memory_bytes // processes
        here = [replace(each, host_memory_bytes=memory_bytes) for each in here]
    else:
        here = [replace(each, beside=_beside(each, here)) for each in here]
    plans = _resolved(here)
    least = min(plan.chunk_tokens for plan in plans)  # a chunk passes through all GPUs
    if any(plan.chunk_tokens != least for plan in plans):
        plans = _resolved([replace(each, chunk_tokens=least) for each in here])
    kv_bytes = situation.shape.kv_bytes(situation.context_tokens, situation.batch)
    room = _host_room_bytes(situation, processes)
    token_bytes = situation.shape.kv_bytes(1, situation.batch)
    longest = room // token_bytes if token_bytes else None
    below = below_host(situation, plans, processes) if token_bytes else None
    if below is not None:
        plans, longest = list(below.plans), below.max_context_tokens
    found = _split_plan(
        situation,
        (RESIDENT, split, spread),
        [_use(each, plan) for each, plan in zip(here, plans, strict=True)],
        [plan.placement for plan in plans],
        kv_host_bytes=kv_bytes if below is None else below.kv_host_bytes,
        max_context_tokens=longest if all(each.least_plan().fits for each in here) else 0,
    )
    if below is None:
        return replace(found, kv_home_bytes=kv_bytes)
    return replace(
        found,
        kv_home_bytes=kv_bytes,
        kv_disk_bytes=below.kv_disk_bytes,
        disk_read_bytes=below.disk_read_bytes,
        disk_short_bytes=below.disk_short_bytes,
    )


def _beside(situation: Situation, here: Sequence[Situation]) -> tuple[ModelShape, ...]:
    """Return what of a model the other GPUs of a process have."""
    return tuple(each.shape for each in here if each is not situation)


def _resolved(here: Sequence[Situation]) -> list[Plan]:
    """Return the plan of each share; equal ones, as ranks are, are planned once."""
    known: dict[tuple[ModelShape, int], Plan] = {}
    for each in here:
        key = each.shape, each.device_memory_bytes
        if key not in known:
            known[key] = each.resolve(keep_resident=True)
    return [known[each.shape, each.device_memory_bytes] for each in here]


def _split_plan(
    situation: Situation,
    what: tuple[str, Split, Spread],
    uses: Sequence[GpuUse],
    placements: Sequence[Placement],
    *,
    kv_host_bytes: int,
    max_context_tokens: int | None,
) -> SplitPlan:
    method, split, spread = what
    shapes = [share.shape for share in spread.shares]
    parts = list(zip(shapes, placements, strict=True))
    tokens = situation.context_tokens
    if split is Split.HEADS:
        each = [heads_times(situation.hardware, part, len(parts), tokens) for part in set(parts)]
        times = max(each, key=lambda own: (own.decode_s, own.prefill_s))  # they wait for each other
    else:
        times = layers_times(situation.hardware, parts, tokens)
    return SplitPlan(
        method=method,
        gpus=len(spread.shares),
        split=split,
        uses=tuple(replace(use, busy=busy) for use, busy in zip(uses, times.busy, strict=True)),
        chunk_tokens=placements[0].chunk_tokens,
        kv_host_bytes=kv_host_bytes,
        weights_host_bytes=spread.host_bytes,
        host_short_bytes=_host_short_bytes(
            situation, len(parts) if split is Split.HEADS else 1, kv_host_bytes
        ),
        max_context_tokens=max_context_tokens,
        prefill_s=times.prefill_s,
        decode_s_per_token=times.decode_s,
        reduce_s=times.reduce_s,
    )


def _of_share(situation: Situation, share: Share, hardware: Hardware | None = None) -> Situation:
    return replace(
        situation,
        shape=share.shape,
        hardware=hardware or situation.hardware,
        device_memory_bytes=share.device_memory_bytes,
    )


def _use(here: Situation, plan: MethodPlan | Plan) -> GpuUse:
    return GpuUse(
        layers=len(here.shape.layers),
        kv_heads=max(layer.kv_heads for layer in here.shape.layers),
        weights_bytes=here.shape.weights_bytes,
        brought_bytes=here.shape.brought_bytes,
        disk_bytes=here.shape.disk_bytes,
        kv_device_bytes=plan.kv_device_bytes,
        resident_bytes=plan.resident_bytes,
        activation_bytes=plan.activation_bytes,
        runtime_bytes=plan.runtime_bytes,
        short_bytes=max(plan.total_device_bytes - here.device_memory_bytes, 0),
    )


def _host_room_bytes(situation: Situation, processes: int) -> int:
    """Return the most KV in host memory; weights that it does not hold beside can be on a disk."""
    each = HostRoom.of_machine(situation.host_memory_bytes // processes, situation.device)
    return processes * each.kv_bytes


def _host_short_bytes(situation: Situation, processes: int, kv_bytes: int) -> int:
    """Return the host memory that is lacking for so much KV."""
    if kv_bytes <= _host_room_bytes(situation, processes):
        return 0
    each = -(-kv_bytes // processes)
    return processes * machine_bytes_for(each, situation.device) - situation.host_memory_bytes
