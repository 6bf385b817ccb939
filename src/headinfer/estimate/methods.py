"""Every way to run a long context, side by side: bytes, the longest context, and times.

The methods are those of the paper's Table 10, with its head-wise offload at 8, 4, 2 and 1 heads and
adaptive, and ours. Ours are bounded (a tile also has a fixed number of tokens) and resident (what
is left of the device memory keeps KV there). Ours are approximate with heads that stream, or
with KV in 8 bits in host memory.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from headinfer.estimate.accounting import PAPER_CHUNK_TOKENS
from headinfer.estimate.situation import MethodPlan, Situation
from headinfer.plan.below_host import disk_read_bytes
from headinfer.plan.choices import ALL_TOKENS, chunk_sizes
from headinfer.plan.format import Format
from headinfer.plan.memory import blocks_bytes
from headinfer.plan.options import Options
from headinfer.plan.plan import Plan
from headinfer.plan.predict import Predictor
from headinfer.plan.resolve import PAGE_TOKENS
from headinfer.plan.step_time import Placement

MAX_CONTEXT_TOKENS = 2**40
"""Contexts are looked for up to here; one that is as long is not limited by memory."""

STANDARD, CHUNKED, QUANTISED = "standard", "chunked-prefill", "kv-4bit"
LAYER_WISE, HEAD_WISE, ADAPTIVE = "layer-wise", "head-wise", "adaptive"
BOUNDED, RESIDENT, HEAD_WISE_SPARSE = "bounded", "resident", "head-wise-sparse"

INT8, FP8 = "headinfer-int8", "headinfer-fp8"
ROUNDED = {Format.INT8: INT8, Format.FP8: FP8}
"""Ours with tokens in 8 bits in host memory, by their form."""

APPROXIMATE = frozenset({QUANTISED, HEAD_WISE_SPARSE, INT8, FP8})
"""Methods whose results differ from standard inference by design."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Footprint:
    """A footprint: the bytes of one method at one context.

    Attributes:
        kv_device_bytes: KV on the device, staging and windows included.
        activation_bytes: the most that activations take.
        kv_total_bytes: KV in all.
        kv_host_bytes: KV in host memory.
        placement: what the method does with the KV.
        tile_tokens: tokens of a tile; None for all.
    """

    kv_device_bytes: int
    activation_bytes: int
    kv_total_bytes: int
    kv_host_bytes: int
    placement: Placement
    tile_tokens: int | None = None


Rule = Callable[[Situation, int], Footprint]
"""The bytes of a method at a context, from the formulas of its row in Table 10."""


def method_plans(situation: Situation) -> list[MethodPlan]:
    """Return every method that the model allows, from standard inference to ours."""
    plans = [*papers_methods(situation)]
    rounded = situation.in_its_format()
    if rounded.shape.host_format.code is not None:
        name = ROUNDED[rounded.shape.host_format]
        plans.append(_of_plan(rounded, name, rounded.resolve(keep_resident=True)))
    situation = situation.of_ours()
    if situation.shape.kv_heads and situation.streaming.sparsity:
        sparse = situation.sparse()
        plans.append(_of_plan(sparse, HEAD_WISE_SPARSE, sparse.resolve(keep_resident=True)))
    plans.append(_of_plan(situation, BOUNDED, situation.resolve(keep_resident=False)))
    if situation.device != "cpu":
        plans.append(_of_plan(situation, RESIDENT, situation.resolve(keep_resident=True)))
    return plans


def papers_methods(situation: Situation) -> Iterator[MethodPlan]:
    """Yield the methods that the paper compares; those that offload only where there is a link."""
    yield _method(situation, STANDARD, _on_device(chunked=False))
    yield _method(situation, CHUNKED, _on_device(chunked=True))
    yield _method(situation, QUANTISED, _quantised)
    if situation.device == "cpu" or not situation.shape.kv_heads:
        return  # one memory, or KV of bounded size: there is nothing to move
    yield _method(situation, LAYER_WISE, _layer_wise)
    wise = {
        heads: _method(situation, f"{HEAD_WISE}-{heads}", _head_wise(heads))
        for heads in (8, 4, 2, 1)
        if heads <= situation.shape.kv_heads
    }
    yield from wise.values()
    # As the paper's adaptive method: the most heads that fit this context.
    heads = next((heads for heads, plan in wise.items() if plan.fits), 1)
    yield replace(wise[heads], method=ADAPTIVE, max_context_tokens=wise[1].max_context_tokens)


def _chunk_tokens(situation: Situation) -> int:
    """Return the chunk of the methods whose chunk is fixed, none longer than the context."""
    if situation.chunk_tokens:
        return situation.chunk_tokens
    if situation.accounting.is_paper:
        return PAPER_CHUNK_TOKENS
    return chunk_sizes(Options(), "cuda", None)[0]


def _on_device(*, chunked: bool) -> Rule:
    def footprint(situation: Situation, tokens: int) -> Footprint:
        accounting = situation.accounting
        chunk = _chunk_tokens(situation) if chunked else None
        new_tokens = min(chunk or tokens, tokens)
        kv_bytes = accounting.kv_bytes(tokens)
        # Where a new token comes, a layer's keys are copied behind the old ones by torch.cat.
        copied = 0 if accounting.is_paper else accounting.layer_kv_bytes(tokens) // 2
        return Footprint(
            kv_device_bytes=kv_bytes + accounting.windows_bytes(new_tokens) + copied,
            activation_bytes=accounting.activation_bytes(new_tokens),
            kv_total_bytes=kv_bytes,
            kv_host_bytes=0,
            placement=Placement(batch=situation.batch, chunk_tokens=chunk),
        )

    return footprint


def _quantised(situation: Situation, tokens: int) -> Footprint:
    accounting = situation.accounting
    packed = accounting.quantised_bytes(tokens)
    share = accounting.quantised_share()
    return Footprint(
        kv_device_bytes=packed + accounting.windows_bytes(tokens),
        activation_bytes=accounting.activation_bytes(tokens),
        kv_total_bytes=packed,
        kv_host_bytes=0,
        placement=Placement(batch=situation.batch, kv_share=share),
    )


def _layer_wise(situation: Situation, tokens: int) -> Footprint:
    """Return two layers on the device, and activations of the whole prompt: it is not chunked."""
    accounting = situation.accounting
    kv_bytes = accounting.kv_bytes(tokens)
    return Footprint(
        kv_device_bytes=2 * accounting.layer_kv_bytes(tokens) + accounting.windows_bytes(tokens),
        activation_bytes=accounting.activation_bytes(tokens),
        kv_total_bytes=kv_bytes,
        kv_host_bytes=kv_bytes,
        placement=Placement(
            batch=situation.batch,
            tile_heads=situation.shape.kv_heads,
            tile_tokens=max(tokens, 1),
        ),
    )


def _head_wise(heads: int) -> Rule:
    def footprint(situation: Situation, tokens: int) -> Footprint:
        return _tiled(situation, tokens, _chunk_tokens(situation), heads, None)

    return footprint


def _tiled(
    situation: Situation, tokens: int, chunk: int, heads: int, tile_tokens: int | None
) -> Footprint:
    """Return the bytes of KV in tiles: the staging buffers, and what goes back to the host."""
    accounting = situation.accounting
    new_tokens = min(chunk, tokens)
    tile = max(tokens if tile_tokens is None else tile_tokens, 1)
    staged = accounting.buffers * accounting.layer_kv_bytes(tile, heads)
    kv_bytes = accounting.kv_bytes(tokens)
    return Footprint(
        kv_device_bytes=staged
        + accounting.write_back_bytes(chunk, PAGE_TOKENS)
        + accounting.windows_bytes(new_tokens),
        activation_bytes=accounting.activation_bytes(new_tokens, tile_heads=heads),
        kv_total_bytes=kv_bytes,
        kv_host_bytes=kv_bytes,
        placement=Placement(
            batch=situation.batch, chunk_tokens=chunk, tile_heads=heads, tile_tokens=tile
        ),
        tile_tokens=tile_tokens,
    )


def _method(situation: Situation, name: str, rule: Rule) -> MethodPlan:
    footprint = rule(situation, situation.context_tokens)
    return _plan(situation, name, footprint, max_context_tokens(situation, rule))


def _plan(
    situation: Situation, name: str, footprint: Footprint, max_context: int | None
) -> MethodPlan:
    tokens, placement = situation.context_tokens, footprint.placement
    total = situation.fixed_bytes + footprint.kv_device_bytes + footprint.activation_bytes
    predictor = Predictor(situation.shape, situation.hardware)
    offloads = placement.tile_tokens is not None
    return MethodPlan(
        method=name,
        tile_heads=placement.tile_heads if offloads else None,
        tile_tokens=footprint.tile_tokens,
        chunk_tokens=placement.chunk_tokens,
        weights_bytes=situation.shape.weights_bytes,
        kv_device_bytes=footprint.kv_device_bytes,
        activation_bytes=footprint.activation_bytes,
        runtime_bytes=situation.accounting.runtime_bytes,
        kv_total_bytes=footprint.kv_total_bytes,
        kv_host_bytes=footprint.kv_host_bytes,
        max_context_tokens=max_context,
        prefill_s=predictor.prefill_s(placement, tokens),
        decode_s_per_token=predictor.decode_s(placement, tokens),
        device_short_bytes=max(total - situation.device_memory_bytes, 0),
        host_short_bytes=situation.host_short_bytes(footprint.kv_host_bytes),
        resident_bytes=placement.resident_bytes,
        answer_resident_bytes=placement.in_answer.resident_bytes,
        host_share=placement.in_answer.host_share,
        decode_parts=predictor.decode(placement, tokens),
        packed_share=situation.shape.packed_share,
    )


def max_context_tokens(situation: Situation, rule: Rule) -> int | None:
    """Return the longest context that fits device and host memory; None where there is no limit.

    Every rule's bytes grow with the context, so this is a search between a context that fits and
    one that does not.
    """
    room = situation.host_room_bytes

    def fits(tokens: int) -> bool:
        footprint = rule(situation, tokens)
        device = footprint.kv_device_bytes + footprint.activation_bytes
        return (
            situation.fixed_bytes + device <= situation.device_memory_bytes
            and footprint.kv_host_bytes <= room
        )

    low, high = 0, MAX_CONTEXT_TOKENS
    if fits(high):
        return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _of_plan(situation: Situation, name: str, plan: Plan) -> MethodPlan:
    """Return the method that a plan of ours is, its longest context being set by its KV alone."""
    accounting, tokens = situation.accounting, situation.context_tokens
    footprint = (
        _paper_footprint(situation, plan) if accounting.is_paper else _footprint(situation, plan)
    )
    kv_bytes = accounting.kv_bytes(tokens)
    # On the CPU all KV lies in the memory that the plan leaves, elsewhere in host memory.
    on_cpu = situation.device == "cpu"
    least = plan if on_cpu else situation.least_plan()
    spare = (situation.options.device_memory_bytes or 0) - least.total_device_bytes
    room = spare if on_cpu else situation.host_room_bytes
    if on_cpu:
        on_device = footprint.kv_device_bytes + kv_bytes
        footprint = replace(footprint, kv_device_bytes=on_device, kv_host_bytes=0)
    max_context = most_tokens(situation, room, [plan])
    if situation.disk is not None and plan.disk_block_tokens:
        tokens = plan.disk_block_tokens
        block = blocks_bytes(plan.shape, tokens, tokens, plan.batch)
        max_context = (plan.disk_host_blocks + situation.disk.free_bytes // block) * tokens
    method = _plan(situation, name, footprint, max_context if spare >= 0 else 0)
    return _with_disk(situation, method, plan) if plan.disk_block_tokens else method


def _with_disk(situation: Situation, method: MethodPlan, plan: Plan) -> MethodPlan:
    """Return a method of ours with what its plan leaves to the disk."""
    assert situation.disk is not None
    tokens = situation.context_tokens
    below_bytes = plan.disk_bytes(tokens)
    return replace(
        method,
        kv_disk_bytes=below_bytes,
        disk_read_bytes=disk_read_bytes(situation.in_answer(plan), tokens),
        disk_short_bytes=max(below_bytes - situation.disk.free_bytes, 0),
        disk_block_tokens=plan.disk_block_tokens,
        disk_host_blocks=plan.disk_host_blocks,
    )


def most_tokens(situation: Situation, room_bytes: int, plans: Sequence[Plan]) -> int | None:
    """Return the tokens of KV that some host memory has room for; None where KV takes none.

    Args:
        situation: of the whole model.
        room_bytes: for all of its KV.
        plans: of each device, whose chunks say how much room pages need that do not pack.
    """
    shape = situation.shape
    if not shape.packs:
        token_bytes = situation.accounting.kv_bytes(1)
        return max(room_bytes, 0) // token_bytes if token_bytes else None
    many = Format.PACKED.row_tokens
    room_bytes -= sum(replace(plan, context_tokens=None).raw_page_bytes for plan in plans)
    return max(room_bytes, 0) // shape.host_kv_bytes(many, situation.batch) * many


def _footprint(situation: Situation, plan: Plan) -> Footprint:
    tokens = situation.context_tokens
    tile_tokens = min(plan.tile_tokens, plan.disk_block_tokens or plan.tile_tokens)
    return Footprint(
        kv_device_bytes=plan.kv_device_bytes,
        activation_bytes=plan.activation_bytes,
        kv_total_bytes=plan.shape.kv_bytes(tokens, plan.batch),
        kv_host_bytes=plan.kv_host_bytes(tokens),
        placement=situation.placement(plan),
        tile_tokens=None if tile_tokens >= ALL_TOKENS else tile_tokens,
    )


def _paper_footprint(situation: Situation, plan: Plan) -> Footprint:
    """Return a plan of ours in the paper's accounting: what its formulas leave is resident."""
    tokens = situation.context_tokens
    tiled = _tiled(situation, tokens, plan.chunk_tokens, plan.tile_heads, plan.tile_tokens)
    if not plan.resident_bytes:
        return tiled
    used = situation.fixed_bytes + tiled.kv_device_bytes + tiled.activation_bytes
    resident = min(max(situation.device_memory_bytes - used, 0), tiled.kv_total_bytes)
    return replace(
        tiled,
        kv_device_bytes=tiled.kv_device_bytes + resident,
        placement=replace(tiled.placement, resident_bytes=resident),
    )
