"""Plans whose calls pass fewer tokens at once, where another cache needs the memory."""

from dataclasses import replace

from headinfer.plan import memory
from headinfer.plan.choices import MIN_CHUNK_TOKENS
from headinfer.plan.plan import Plan


def narrowed(plan: Plan, activation_bytes: int) -> Plan:
    """Return a plan with chunks that are short enough for some memory.

    Nothing that the cache holds changes. A chunk is not made shorter than `MIN_CHUNK_TOKENS`.

    Args:
        plan: of a cache, at rest.
        activation_bytes: the most that a call with it may take for activations.
    """
    chunk_tokens = plan.chunk_tokens
    needed = plan.activation_bytes
    while needed > activation_bytes and chunk_tokens // 2 >= MIN_CHUNK_TOKENS:
        chunk_tokens //= 2
        needed = memory.activation_bytes(
            plan.shape,
            chunk_tokens=chunk_tokens,
            tile_heads=plan.tile_heads,
            batch=plan.batch,
            device=plan.device,
        )
    return replace(plan, chunk_tokens=chunk_tokens, activation_bytes=needed)


def for_prompts(plan: Plan) -> Plan:
    """Return the plan to go back to for a prompt, where one is for an answer; else that one.

    Blocks above a disk stay as few as they became meanwhile.
    """
    if plan.prompt_plan is None:
        return plan
    return replace(
        plan.prompt_plan,
        disk_host_blocks=plan.disk_host_blocks,
        disk_staging_bytes=plan.disk_staging_bytes,
    )


def without_residents(plan: Plan) -> Plan:
    """Return a plan for prompts that keeps no token resident."""
    return replace(for_prompts(plan), resident_tokens=0, resident_bytes=0)


def with_fewer_residents(plan: Plan, tokens: int) -> Plan:
    """Return a plan that keeps no more than so many tokens resident."""
    if plan.resident_tokens <= tokens:
        return plan
    size = memory.resident_bytes(plan.shape, resident_tokens=tokens, batch=plan.batch)
    return replace(plan, resident_tokens=tokens, resident_bytes=size)
