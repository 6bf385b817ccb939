"""What a model takes on several GPUs, and for how long: by layers, by heads, and on one of them."""

from collections.abc import Callable, Sequence
from dataclasses import replace

from headinfer.errors import OptionError
from headinfer.estimate.methods import (
    RESIDENT,
    ROUNDED,
    STANDARD,
    most_tokens,
    papers_methods,
)
from headinfer.estimate.situation import MethodPlan, Situation
from headinfer.estimate.split_disk import below_host
from headinfer.estimate.split_plan import GpuUse, Split, SplitPlan
from headinfer.estimate.split_times import heads_times, layers_times, shared_hardware
from headinfer.estimate.spread import Share, Spread, by_heads, by_layers, heads_obstacle
from headinfer.plan.hardware import Hardware
from headinfer.plan.host_room import HostRoom, machine_bytes_for
from headinfer.plan.plan import Plan
from headinfer.plan.shape import ModelShape
from headinfer.plan.step_time import Placement
from headinfer.units import counted

_WHOLE = "--load-in quantises whole matrices, which ranks do not have"


_Spreading = Callable[[ModelShape, int], Spread]
"""Spreads a model, beside so many bytes of KV in host memory."""


def split_plans(
    situation: Situation, memory_bytes: Sequence[int], *, quantising: bool = False
) -> list[SplitPlan]:
    """Return standard inference and ours on one GPU, and on all of them by layers and by heads.

    Tokens of ours have the form asked for; 8 bits are a method more, which is approximate.

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
            f"there are {gpus} GPUs, and {shape.name} has {counted(len(shape.layers), 'layer')}; "
            "give at most as many GPUs"
        )
    one = memory_bytes[:1]
    plans = _methods(situation, Split.NONE, _in_layers(situation, one, quantising=quantising))
    if gpus == 1:
        return plans
    spreading = _in_layers(situation, memory_bytes, quantising=quantising)
    plans += _methods(situation, Split.LAYERS, spreading)
    obstacle = _WHOLE if quantising else heads_obstacle(shape, gpus)
    if obstacle is None:
        plans += _methods(situation, Split.HEADS, lambda shape, _: by_heads(shape, memory_bytes))
    else:
        plans.append(SplitPlan(method=RESIDENT, gpus=gpus, split=Split.HEADS, obstacle=obstacle))
    return plans


def layers_plan(
    situation: Situation, memory_bytes: Sequence[int], *, quantising: bool = False
) -> SplitPlan:
    """Return ours by layers alone; see `split_plans`."""
    spreading = _in_layers(situation, memory_bytes, quantising=quantising)
    return _beside_weights(situation.of_ours(), RESIDENT, Split.LAYERS, spreading)


def _in_layers(
    situation: Situation, memory_bytes: Sequence[int], *, quantising: bool
) -> _Spreading:
    # CPU memory has KV first: what it does not hold of the weights can lie on a disk.
    room = HostRoom.of_machine(situation.host_memory_bytes, situation.device).kv_bytes

    def spreading(shape: ModelShape, kv_bytes: int) -> Spread:
        if quantising and len(memory_bytes) == 1:  # nothing spreads it
            return Spread(shares=(Share(shape=shape, device_memory_bytes=memory_bytes[0]),))
        host_bytes = max(room - kv_bytes, 0)
        return by_layers(shape, memory_bytes, host_bytes=host_bytes, quantising=quantising)

    return spreading


def _methods(situation: Situation, split: Split, spreading: _Spreading) -> list[SplitPlan]:
    """Return stock transformers' way, and ours: in 8 bits where that was asked for, and exact."""
    plans = [_standard(situation, split, spreading(situation.shape, 0))]
    rounded = situation.in_its_format()
    if name := ROUNDED.get(rounded.shape.host_format):
        plans.append(_beside_weights(rounded, name, split, spreading))
    return [*plans, _beside_weights(situation.of_ours(), RESIDENT, split, spreading)]


def _beside_weights(
    situation: Situation, method: str, split: Split, spreading: _Spreading
) -> SplitPlan:
    """Return a plan of ours, which leaves host memory to weights that no GPU holds."""
    shape = situation.shape
    kv_bytes = shape.host_kv_bytes(situation.context_tokens, situation.batch)
    plan = _ours(situation, method, split, spreading(shape, kv_bytes))
    if plan.brought_bytes and shape.packs:  # its room for pages that do not pack is known now
        plan = _ours(situation, method, split, spreading(shape, plan.kv_host_bytes))
    return plan


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


def _ours(situation: Situation, method: str, split: Split, spread: Spread) -> SplitPlan:
    """Return a plan of ours: KV in host memory, and on each GPU what fits."""
    processes = len(spread.shares) if split is Split.HEADS else 1
    here = _each(situation, split, spread)
    plans = _resolved(here)
    least = min(plan.chunk_tokens for plan in plans)  # a chunk passes through all GPUs
    if any(plan.chunk_tokens != least for plan in plans):
        plans = _resolved([replace(each, chunk_tokens=least) for each in here])
    tokens = situation.context_tokens
    kv_bytes = situation.shape.kv_bytes(tokens, situation.batch)
    longest = most_tokens(situation, _host_room_bytes(situation, processes), plans)
    below = below_host(situation, plans, processes) if longest is not None else None
    if below is not None:
        plans, longest = list(below.plans), below.max_context_tokens
    found = _split_plan(
        situation,
        (method, split, spread),
        [_use_of_ours(each, plan) for each, plan in zip(here, plans, strict=True)],
        [each.placement(plan) for each, plan in zip(here, plans, strict=True)],
        kv_host_bytes=sum(plan.kv_host_bytes(tokens) for plan in plans),
        max_context_tokens=longest if all(each.least_plan().fits for each in here) else 0,
    )
    found = replace(found, kv_home_bytes=kv_bytes, packed_share=situation.shape.packed_share)
    if below is None:
        return found
    return replace(
        found,
        kv_disk_bytes=below.kv_disk_bytes,
        disk_read_bytes=below.disk_read_bytes,
        disk_short_bytes=below.disk_short_bytes,
    )


def _each(situation: Situation, split: Split, spread: Spread) -> list[Situation]:
    """Return the situation of each GPU: ranks have parts of the CPU, layers share all of it."""
    ranks = len(spread.shares)
    if split is not Split.HEADS:
        here = [_of_share(situation, share) for share in spread.shares]
        return [replace(each, beside=_beside(each, here)) for each in here]
    hardware = shared_hardware(situation.hardware, ranks)
    memory_bytes = situation.host_memory_bytes // ranks
    here = [_of_share(situation, share, hardware) for share in spread.shares]
    return [replace(each, host_memory_bytes=memory_bytes) for each in here]


def _beside(situation: Situation, here: Sequence[Situation]) -> tuple[ModelShape, ...]:
    """Return what of a model the other GPUs of a process have."""
    return tuple(each.shape for each in here if each is not situation)


def _resolved(here: Sequence[Situation]) -> list[Plan]:
    """Return the plan of each share; those alike, as ranks are, are planned once."""
    known: dict[tuple[ModelShape, int], Plan] = {}
    plans = []
    for each in here:
        shape = each.shape
        if not (shape.packs and each.disk):  # sizes are chosen by the place of layers there alone
            shape = replace(shape, stage=0)
        key = shape, each.device_memory_bytes
        if key not in known:
            known[key] = replace(each, shape=shape).resolve(keep_resident=True)
        plans.append(replace(known[key], shape=each.shape))
    return plans


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
    lacking = any(share.short_bytes for share in spread.shares)
    return SplitPlan(
        method=method,
        gpus=len(spread.shares),
        split=split,
        uses=tuple(
            replace(use, busy=busy, short_bytes=max(use.short_bytes, share.short_bytes))
            for use, busy, share in zip(uses, times.busy, spread.shares, strict=True)
        ),
        chunk_tokens=placements[0].chunk_tokens,
        kv_host_bytes=kv_host_bytes,
        weights_host_bytes=spread.host_bytes,
        host_short_bytes=_host_short_bytes(
            situation, len(parts) if split is Split.HEADS else 1, kv_host_bytes
        ),
        max_context_tokens=0 if lacking else max_context_tokens,
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


def _use_of_ours(here: Situation, plan: Plan) -> GpuUse:
    return replace(
        _use(here, plan),
        kv_host_bytes=plan.kv_host_bytes(here.context_tokens),
        raw_page_bytes=plan.raw_page_bytes,
        answer_resident_bytes=here.in_answer(plan).resident_bytes,
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
