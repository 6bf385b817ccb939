"""Plans for answers: memory of a prompt's activations holds resident tokens until the next one."""

from dataclasses import replace

from headinfer.plan import memory
from headinfer.plan.hardware import Hardware
from headinfer.plan.host_share import where_the_host_pays, with_host_share
from headinfer.plan.options import Options
from headinfer.plan.plan import Plan
from headinfer.plan.residents import may_answer, with_residents
from headinfer.plan.step_time import Placement

SHORT_CALL_TOKENS = 1024
"""New tokens of each row in the longest call that a plan for answers is for: a short question."""

_LEAST_GAIN = 1 / 32
"""Share of the streamed bytes that an answer must be spared. Less is not worth another arena."""


def answering(plan: Plan, options: Options, hardware: Hardware | None = None) -> Plan | None:
    """Return a plan for short calls behind a prompt; None where it would spare too few bytes.

    It differs in the tokens that pass at once, in what these take, in the resident tokens, and in
    the CPU's share of the others. None as well where `may_answer` says so.

    Args:
        plan: of a cache on one device, under which its prompts pass.
        options: what the user set.
        hardware: the machine whose rates predict times.
    """
    context, shape = plan.context_tokens, plan.shape
    given = replace(options, device_memory_bytes=plan.device_memory_bytes)
    if context is None or not may_answer(shape, given, plan.device):
        return None
    chunk_tokens, batch = min(plan.chunk_tokens, SHORT_CALL_TOKENS), plan.batch
    short = replace(
        plan,
        prompt_plan=plan,
        chunk_tokens=chunk_tokens,
        whole_tokens=0,
        resident_tokens=0,
        resident_bytes=0,
        chunk_page_bytes=memory.chunk_page_bytes(shape, chunk_tokens=chunk_tokens, batch=batch),
        packed_bytes=memory.packed_bytes(shape, chunk_tokens=chunk_tokens, batch=batch),
        window_bytes=memory.window_bytes(
            shape, chunk_tokens=chunk_tokens, page_tokens=plan.page_tokens, batch=batch
        ),
        activation_bytes=memory.activation_bytes(
            shape,
            chunk_tokens=chunk_tokens,
            tile_heads=plan.tile_heads,
            batch=batch,
            device=plan.device,
        ),
    )
    shared = with_host_share(with_residents(short, context), options, hardware)
    short = where_the_host_pays(shared, hardware)
    streamed = plan.streamed_bytes(context)
    spared = streamed - short.streamed_bytes(context)
    return short if spared > _LEAST_GAIN * streamed else None


def in_answer(plan: Plan, options: Options, hardware: Hardware | None) -> Plan:
    """Return the plan for a prompt's answer; the prompt's own where there is no other."""
    return answering(plan, options, hardware) or plan


def placement_with(plan: Plan, answer: Plan) -> Placement:
    """Return what a plan does with the KV cache, and what the plan for its answer does."""
    placement = plan.placement
    return placement if answer is plan else replace(placement, answer=answer.placement)
