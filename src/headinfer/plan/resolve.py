"""The way from options to a plan: the fastest, or the largest, of the sizes that are left open."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from headinfer.errors import MemoryPlanError, OptionError
from headinfer.plan import memory
from headinfer.plan.below_host import InBlocks
from headinfer.plan.choices import (
    LARGE_CHUNK_TOKENS,
    MIN_CHUNK_TOKENS,
    MIN_TILE_TOKENS,
    chunk_sizes,
    other_tile_tokens,
    tile_sizes,
)
from headinfer.plan.drafts import with_drafts
from headinfer.plan.hardware import Hardware
from headinfer.plan.host_share import where_the_host_pays, with_host_share
from headinfer.plan.options import Options
from headinfer.plan.plan import Plan
from headinfer.plan.predict import Predictor
from headinfer.plan.residents import may_answer, with_residents
from headinfer.plan.shape import ModelShape
from headinfer.units import counted, format_bytes

PAGE_TOKENS = 64
"""Tokens of one decode-tail page: 32 layers of Llama-3-8B then send 8 MiB home at a time."""

_NO_DISK = InBlocks()


def resolve(
    shape: ModelShape,
    options: Options,
    *,
    device: str,
    batch: int = 1,
    context_tokens: int | None = None,
    hardware: Hardware | None = None,
    in_blocks: InBlocks = _NO_DISK,
) -> Plan:
    """Turn options into a plan that fits, choosing what was left to "auto".

    With `hardware` and a known context that is the plan of the least predicted time, otherwise the
    one with the largest chunks and transfers.

    Args:
        shape: the model.
        options: what the user set.
        device: the kind of device: "cpu", "cuda" or "simulated".
        batch: rows of the cache.
        context_tokens: tokens expected in the cache; None when not known yet.
        hardware: the machine whose rates predict times.
        in_blocks: of host memory, where a disk lies below it: tokens then are in blocks, unless
            there is no room for any.

    Raises:
        OptionError: a tile is larger than the model allows.
        MemoryPlanError: no choice of the open settings fits the device memory.
    """
    kv_heads = shape.exact.kv_heads
    if isinstance(options.tile_heads, int) and 0 < kv_heads < options.tile_heads:
        raise OptionError(
            f"tile_heads is {options.tile_heads}, but {shape.name} has "
            f"{counted(kv_heads, 'KV head')}; use a number from 1 to {kv_heads}, or 'all'"
        )
    if options.tile_tokens == "all" and device != "cpu" and context_tokens is None:
        context_tokens = shape.max_positions or None
        if context_tokens is None:
            raise OptionError("tile_tokens 'all' needs a known context; give a number of tokens")
    candidates = _candidates(shape, options, device, batch, context_tokens, in_blocks)
    first = None
    for first in candidates:
        if first.fits:
            break
    else:
        if first is None and in_blocks.room_bytes is not None:
            # Whoever asks refuses it, or makes room.
            return resolve(
                *(shape, options),
                device=device,
                batch=batch,
                context_tokens=context_tokens,
                hardware=hardware,
            )
        raise _refusal(first, smallest_plan(shape, options, device=device, batch=batch))
    resident = _Residency(options, context_tokens)
    largest = resident.of(first)
    # Where the largest chunks leave room for all tokens nothing is faster: that is a short prompt's
    # plan, which would else wait for hundreds of others to be compared.
    fits = context_tokens is not None and 0 < context_tokens <= largest.resident_tokens
    if hardware is None or context_tokens is None or fits:
        return where_the_host_pays(with_host_share(largest, options, hardware), hardware)
    fitting = [first, *(plan for plan in candidates if plan.fits)]
    # On several devices the last one waits for the first chunk to come through the others.
    alone = not in_blocks.beside
    if alone and options.chunk_tokens == "auto" and may_answer(shape, options, device):
        large = replace(options, chunk_tokens=LARGE_CHUNK_TOKENS)
        larger = _candidates(shape, large, device, batch, context_tokens, in_blocks)
        fitting = [*(plan for plan in larger if plan.fits), *fitting]
    plans = [
        with_host_share(plan, options, hardware)
        for plan in _fastest_candidates(fitting, options, resident, context_tokens, in_blocks)
    ]
    fastest = _fastest(plans, Predictor(shape, hardware), context_tokens)
    return where_the_host_pays(fastest, hardware)


_LATER = 1.01
"""How much longer than the fastest plan another may take for a prompt, if its answer is faster.

Smaller chunks leave room for more resident tokens, which answers profit from. But prompts are what
users wait for first.

Measured beside an H100, Llama-3-8B held to 24 GiB and 400K tokens (1.5% of a prompt predicted):

- chunks of 8K: 92.6 s, then 613 ms a token
- chunks of 16K: 90.3 s, then 520 ms a token
"""


def _fastest(plans: list[Plan], predictor: Predictor, tokens: int) -> Plan:
    """Return the plan of the least predicted time, of those that are not late with a prompt.

    Among equally fast plans the one that streams least leaves the most for later. Among those the
    first is preferred. Plans that cannot be it by what they take at least are not looked at closer.
    """
    prefill_s = [predictor.prefill_s(plan.placement, tokens) for plan in plans]
    most_s = _LATER * min(prefill_s)
    plans = [plan for plan, seconds in zip(plans, prefill_s, strict=True) if seconds <= most_s]
    least_s = [predictor.least_answer_s(plan.placement, tokens) for plan in plans]
    best: tuple[float, int, int] | None = None
    for position in sorted(range(len(plans)), key=least_s.__getitem__):
        if best is not None and least_s[position] > best[0]:
            break
        plan = plans[position]
        seconds = predictor.answer_s(plan.placement, tokens)
        cost = seconds, plan.streamed_bytes(tokens), position
        best = cost if best is None else min(best, cost)
    assert best is not None
    return plans[best[2]]


def _candidates(
    shape: ModelShape,
    options: Options,
    device: str,
    batch: int,
    context_tokens: int | None,
    in_blocks: InBlocks,
) -> Iterator[Plan]:
    """Yield plans from the largest transfers to the smallest."""
    for chunk_tokens in chunk_sizes(options, device, context_tokens):
        for tile_heads, tile_tokens in tile_sizes(shape, options, device, context_tokens):
            yield from in_blocks.of(
                _plan(
                    *(shape, options, device, batch, context_tokens),
                    *(chunk_tokens, tile_heads, tile_tokens),
                )
            )


def _fastest_candidates(
    fitting: list[Plan],
    options: Options,
    residency: "_Residency",
    context_tokens: int,
    in_blocks: InBlocks,
) -> Iterator[Plan]:
    """Yield those of the plans that fit among which the fastest is, the preferred ones first.

    Each chunk and number of heads gives the plan with the largest usual tile. Larger and smaller
    tiles make further plans of it.
    """
    largest: dict[tuple[int, int], Plan] = {}
    for plan in fitting:
        largest.setdefault((plan.chunk_tokens, plan.tile_heads), plan)
    for plan in largest.values():
        yield residency.of(plan)
    for plan in largest.values():
        if plan.device == "cpu":
            continue  # its tiles are views of any size
        for tile_tokens in other_tile_tokens(options, plan.tile_tokens, context_tokens):
            for other in in_blocks.of(_replan(plan, options, tile_tokens)):
                if other.fits:
                    yield residency.of(other)


@dataclass(frozen=True, slots=True)
class _Residency:
    """A wish for resident tokens, granted as far as they fit."""

    options: Options
    context_tokens: int | None

    @property
    def wanted(self) -> int:
        """The most tokens to keep."""
        if isinstance(self.options.resident_tokens, int):
            return self.options.resident_tokens
        if self.options.resident_tokens == "auto" and self.options.device_memory_bytes is None:
            return 0  # nothing says how much there is
        return self.context_tokens or 0

    def of(self, plan: Plan) -> Plan:
        """Return a plan with as many of them as fit beside what it has, and beside drafts."""
        plan = with_drafts(plan, self.options)
        if plan.device == "cpu" or not self.wanted:
            return plan
        tokens = (
            self.wanted if self.context_tokens is None else (min(self.wanted, self.context_tokens))
        )
        return with_residents(plan, tokens)


def _replan(plan: Plan, options: Options, tile_tokens: int) -> Plan:
    """Return a plan with other tile tokens and the bytes that go with them."""
    return _plan(
        plan.shape,
        options,
        plan.device,
        plan.batch,
        plan.context_tokens,
        plan.chunk_tokens,
        plan.tile_heads,
        tile_tokens,
    )


def _plan(
    shape: ModelShape,
    options: Options,
    device: str,
    batch: int,
    context_tokens: int | None,
    chunk_tokens: int,
    tile_heads: int,
    tile_tokens: int,
) -> Plan:
    copies = device != "cpu"
    page_tokens = max(min(PAGE_TOKENS, chunk_tokens // 2), 1)  # so that no chunk fits in a page
    return Plan(
        shape=shape,
        device=device,
        overlap=options.overlap,
        batch=batch,
        context_tokens=context_tokens,
        chunk_tokens=chunk_tokens,
        tile_heads=tile_heads,
        tile_tokens=tile_tokens,
        page_tokens=page_tokens,
        device_memory_bytes=options.device_memory_bytes,
        staging_bytes=copies
        * memory.staging_bytes(
            shape, tile_heads=tile_heads, tile_tokens=tile_tokens if copies else 0, batch=batch
        ),
        tail_bytes=copies * memory.tail_bytes(shape, page_tokens=page_tokens, batch=batch),
        chunk_page_bytes=copies
        * memory.chunk_page_bytes(shape, chunk_tokens=chunk_tokens, batch=batch),
        unpacked_bytes=copies
        * memory.unpacked_bytes(
            shape, tile_heads=tile_heads, tile_tokens=tile_tokens if copies else 0, batch=batch
        ),
        packed_bytes=copies * memory.packed_bytes(shape, chunk_tokens=chunk_tokens, batch=batch),
        window_bytes=memory.window_bytes(
            shape, chunk_tokens=chunk_tokens, page_tokens=page_tokens, batch=batch
        ),
        activation_bytes=memory.activation_bytes(
            shape,
            chunk_tokens=chunk_tokens,
            tile_heads=tile_heads,
            batch=batch,
            device=device,
        ),
        runtime_bytes=memory.runtime_bytes(device),
    )


def _least(plans: list[Plan]) -> Plan:
    return min(plans, key=lambda plan: plan.total_device_bytes)


def least_plan(shape: ModelShape, options: Options, *, device: str, batch: int = 1) -> Plan:
    """Return the plan that takes the least device memory of those that options allow."""
    return _least(list(_candidates(shape, options, device, batch, None, InBlocks())))


def smallest_plan(shape: ModelShape, options: Options, *, device: str, batch: int = 1) -> Plan:
    """Return the plan that takes the least device memory, whatever was set of chunks and tiles."""
    return _plan(shape, options, device, batch, None, MIN_CHUNK_TOKENS, 1, MIN_TILE_TOKENS)


def _refusal(tried: Plan | None, smallest: Plan) -> MemoryPlanError:
    budget = smallest.device_memory_bytes or 0
    weights = smallest.shape.weights_bytes
    given = f"the device memory of {format_bytes(budget)}"
    runtime = smallest.runtime_bytes
    of_which = f", of which weights {format_bytes(weights)}"
    of_which += f" and CUDA itself {format_bytes(runtime)}" if runtime else ""
    if weights >= budget:
        return MemoryPlanError(
            f"{given} is below the weights of {smallest.shape.name}, {format_bytes(weights)}; "
            f"give at least {format_bytes(smallest.total_device_bytes)}{of_which}"
        )
    if smallest.total_device_bytes > budget:
        return MemoryPlanError(
            f"{given} is too small: the smallest settings (chunk_tokens={smallest.chunk_tokens}, "
            f"tile_heads=1, tile_tokens={smallest.tile_tokens}) need "
            f"{format_bytes(smallest.total_device_bytes)}{of_which}"
        )
    needed = f", which need {format_bytes(tried.total_device_bytes)}" if tried else ""
    return MemoryPlanError(
        f"{given} does not hold the settings given{needed}; chunk_tokens={smallest.chunk_tokens}, "
        f"tile_heads=1, tile_tokens={smallest.tile_tokens} need "
        f"{format_bytes(smallest.total_device_bytes)}{of_which}"
    )
