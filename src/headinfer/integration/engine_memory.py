"""Memory of a cache's engine, which is made sure of before it is taken."""

import torch

from headinfer.engine.parted import CacheEngine
from headinfer.errors import MemoryPlanError
from headinfer.integration.cache_host import CacheHost
from headinfer.plan.growing import with_growth
from headinfer.plan.plan import Plan
from headinfer.units import counted_tokens


def engine_with_memory(
    host: CacheHost,
    batch: int,
    tokens: int,
    dtype: torch.dtype,
    what: str,
    *,
    grows: bool,
    sharing: CacheEngine | None = None,
) -> CacheEngine:
    """Return an engine that will hold some tokens, with memory for them.

    Args:
        host: the attachment.
        batch: rows.
        tokens: of each row.
        dtype: of keys and values.
        what: the cache, for messages.
        grows: whether its plan is for more tokens, as nobody said how many come.
        sharing: the engine of which it is to be a copy.

    Raises:
        MemoryPlanError: the device, the host memory or the disk is too small.
    """
    planned_tokens = with_growth(tokens) if grows else tokens
    plan = host.plan_for(batch, planned_tokens, sharing=sharing, dtype=dtype)
    host.check_host_room(
        plan.kv_host_bytes(tokens),
        plan.arena_bytes + plan.activation_bytes + plan.assistant.working_bytes,
        f"{what} of {counted_tokens(tokens)}",
    )
    host.disk.check_space(plan, tokens)
    engine = host.make_engine(plan, dtype)
    engine.expect(tokens)
    return engine


def make_room(host: CacheHost, engine: CacheEngine, tokens: int) -> None:
    """Make sure of host memory for so many tokens; above a disk have fewer blocks, if need be.

    Others may have been planned with what this cache was to take, and had not taken yet.

    Raises:
        MemoryPlanError: there is none.
    """
    try:
        check_room(host, engine.missing_bytes(tokens), tokens, engine.plan)
    except MemoryPlanError:
        if host.disk.file is None:
            raise
        plan = host.plan_for(engine.plan.batch, tokens, replacing=engine)
        host.disk.lower_to(engine, plan)
        check_room(host, engine.missing_bytes(tokens), tokens, engine.plan)


def check_room(host: CacheHost, needed_bytes: int, tokens: int, plan: Plan) -> None:
    """Refuse what host memory has no room for, under the plan of an engine that is there.

    Args:
        host: the attachment.
        needed_bytes: beside those that the engine has.
        tokens: that it is to hold.
        plan: of the engine.

    Raises:
        MemoryPlanError: there is no room.
    """
    host.check_host_room(
        *(needed_bytes, plan.activation_bytes), f"the KV cache of {counted_tokens(tokens)}"
    )
