"""How many tokens drafts attend: pure arithmetic.

A draft reads its copies as fast as residents, and drafts are worth little where they attend little.
So an eighth of the context is taken, out of what residents would have.
"""

from dataclasses import replace

from headinfer.plan import memory
from headinfer.plan.options import Options
from headinfer.plan.plan import Plan
from headinfer.plan.shape import LayerKind

_LEAST_TOKENS = 256
"""Fewer are not worth their memory. With an eighth of 8K tokens SmolLM2 had 3.5 of 4 drafts
accepted in prose, and with 256 tokens 2.5."""

_CONTEXT_DIVISOR = 8
_MEMORY_DIVISOR = 2
"""Residents have half of the memory that is left, at least."""


def with_drafts(plan: Plan, options: Options) -> Plan:
    """Return a plan with copies of tokens for drafts, as far as they fit beside what it has.

    Args:
        plan: without residents.
        options: what the user set.
    """
    shape = plan.shape
    states = any(layer.kind is LayerKind.STATE for layer in shape.kinds_of_layers)
    if not options.draft_tokens or plan.batch > 1 or states or not shape.full_layers:
        return plan
    left = None
    if plan.device_memory_bytes is not None:
        left = plan.device_memory_bytes - plan.total_device_bytes
    if options.draft_tokens != "auto":
        tokens = options.draft_tokens
    else:
        tokens = _chosen(plan, options, left)
        left = left and left // _MEMORY_DIVISOR
    if left is not None:
        most = memory.draft_tokens(shape, left, batch=plan.batch)
        if most < tokens and most < _LEAST_TOKENS:
            return plan
        tokens = min(tokens, most)
    size = memory.draft_bytes(shape, draft_tokens=tokens, batch=plan.batch)
    return replace(plan, draft_tokens=tokens, draft_bytes=size)


def _chosen(plan: Plan, options: Options, left: int | None) -> int:
    """Return the tokens of "auto"; none where drafts would attend nearly all, or all is resident.

    Args:
        plan: without residents.
        options: what the user set.
        left: bytes of device memory that residents and drafts can have; None for no limit.
    """
    context = plan.context_tokens
    if context is None:
        return _LEAST_TOKENS
    tokens = max(context // _CONTEXT_DIVISOR, _LEAST_TOKENS)
    if left is not None and plan.device != "cpu" and options.resident_tokens in ("auto", "all"):
        resident = memory.resident_tokens(plan.shape, left, batch=plan.batch)
        if resident >= context:
            return 0
    return tokens if context > 4 * tokens else 0
