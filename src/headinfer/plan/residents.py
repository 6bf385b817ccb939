"""How many tokens are resident, and whether an answer may have more of them than its prompt."""

from dataclasses import replace

from headinfer.plan import memory
from headinfer.plan.format import Format
from headinfer.plan.options import Options
from headinfer.plan.plan import Plan
from headinfer.plan.shape import ModelShape


def with_residents(plan: Plan, tokens: int) -> Plan:
    """Return a plan without resident tokens with so many, or with as many as fit."""
    if plan.device_memory_bytes is not None:
        left = plan.device_memory_bytes - plan.total_device_bytes
        fitting = memory.resident_tokens(plan.shape, left, batch=plan.batch)
        if plan.shape.packs:  # tiles behind them then begin where pages do
            fitting -= fitting % Format.PACKED.row_tokens
        tokens = min(tokens, fitting)
    size = memory.resident_bytes(plan.shape, resident_tokens=tokens, batch=plan.batch)
    return replace(plan, resident_tokens=tokens, resident_bytes=size)


def may_answer(shape: ModelShape, options: Options, device: str) -> bool:
    """Whether residents of an answer may have the memory of a prompt's activations.

    They may not where their number is none of ours to choose: on the CPU, without a budget, or
    where the user gave it. Neither may they beside drafts, because residents cannot change while
    anything is drafted. Several ranks would have to change at the same step.

    Args:
        shape: the model, as one device has it.
        options: what the user set, and the device memory there is.
        device: the kind of device.
    """
    if device == "cpu" or options.device_memory_bytes is None or options.draft_tokens:
        return False
    given = isinstance(options.resident_tokens, int)
    return not given and shape.ranks == 1
