"""Plans with room for a call whose tokens all pass through the model at once."""

from dataclasses import replace

from headinfer.errors import MemoryPlanError
from headinfer.plan import memory
from headinfer.plan.options import Options
from headinfer.plan.plan import Plan
from headinfer.plan.resolve import least_plan
from headinfer.units import format_bytes, format_tokens


def passing_whole(plan: Plan, options: Options, tokens: int) -> Plan:
    """Return a plan changed as little as it takes for a call of many tokens to pass at once.

    Resident tokens are given up first, and then what options leave open.

    Args:
        plan: of the cache.
        options: what the user set.
        tokens: new tokens of the call in each row.

    Raises:
        MemoryPlanError: the device memory does not hold so many tokens at once.
    """
    if tokens <= max(plan.chunk_tokens, plan.whole_tokens):
        return plan
    whole = _with_room(plan, tokens)
    if whole.fits:
        return whole
    smallest = least_plan(plan.shape, options, device=plan.device, batch=plan.batch)
    least = _with_room(
        replace(
            smallest,
            context_tokens=plan.context_tokens,
            device_memory_bytes=plan.device_memory_bytes,
            assistant=plan.assistant,
            host_share=plan.host_share,
            verify_host_share=plan.verify_host_share,
            host_share_adapts=plan.host_share_adapts,
            host_unmeasured=plan.host_unmeasured,
            host_left_out=plan.host_left_out,
        ),
        tokens,
    )
    if least.fits:
        return least
    raise MemoryPlanError(
        f"the device memory of {format_bytes(plan.device_memory_bytes or 0)} does not hold "
        f"{format_tokens(tokens)} tokens at once, which need "
        f"{format_bytes(least.total_device_bytes)}; shorten the prompt or give more"
    )


def _with_room(plan: Plan, tokens: int) -> Plan:
    """Return a plan for calls of so many tokens, with as many residents as then fit."""
    shape, batch = plan.shape, plan.batch
    whole = replace(
        plan,
        whole_tokens=tokens,
        window_bytes=shape.window_bytes(tokens, batch),
        activation_bytes=memory.activation_bytes(
            shape,
            chunk_tokens=tokens,
            tile_heads=plan.tile_heads,
            batch=batch,
            device=plan.device,
        ),
    )
    if whole.device_memory_bytes is None or not whole.resident_tokens:
        return whole
    left = whole.device_memory_bytes - (whole.total_device_bytes - whole.resident_bytes)
    resident = min(whole.resident_tokens, memory.resident_tokens(shape, left, batch=batch))
    size = memory.resident_bytes(shape, resident_tokens=resident, batch=batch)
    return replace(whole, resident_tokens=resident, resident_bytes=size)
