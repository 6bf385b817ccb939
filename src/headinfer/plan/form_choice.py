"""Whether tokens are packed in host memory, where users leave it open. Pure arithmetic."""

import contextlib
from collections.abc import Callable
from dataclasses import replace

from headinfer.errors import MemoryPlanError
from headinfer.plan.answering import in_answer, placement_with
from headinfer.plan.format import Format
from headinfer.plan.hardware import Hardware
from headinfer.plan.options import Options
from headinfer.plan.plan import Plan
from headinfer.plan.predict import Predictor
from headinfer.plan.shape import ModelShape

_STEP_SHARE = 0.95
"""Share of a dense decode step's time that a packed one takes at most. Less is not worth it."""

_PROMPT_SHARE = 1.03
"""The same of a prompt, which users wait for first: dense tokens may pass in larger chunks."""


def with_chosen_form(
    shape: ModelShape,
    options: Options,
    hardware: Hardware | None,
    resolved: Callable[[ModelShape, Options], Plan],
    works: Callable[[], bool] = lambda: True,
) -> Plan:
    """Return the plan of a cache, with packed tokens where its decode steps gain by them.

    Args:
        shape: of the model, dense where the form is open.
        options: what the user set. The form is open where `kv_cache` is "auto".
        hardware: whose rates are known; None where they are not.
        resolved: returns the plan of a shape with some options.
        works: whether the device packs tokens right; asked where that is to be done.

    Raises:
        MemoryPlanError: none fits.
    """
    plan, packed = resolved(shape, options), shape.packed
    tokens = plan.context_tokens or 0
    is_open = options.kv_cache == "auto" and shape.host_format is Format.DENSE and packed.packs
    if not is_open or plan.device == "cpu" or tokens <= plan.resident_tokens:
        return plan
    other = _beside(plan, packed, options, resolved)
    if other is not None and _pays(other, plan, options, hardware) and works():
        return other
    return plan


def _beside(
    dense: Plan,
    packed: ModelShape,
    options: Options,
    resolved: Callable[[ModelShape, Options], Plan],
) -> Plan | None:
    """Return the plan of packed tokens to compare with a dense one; None where none fits.

    Other chunks than the dense plan's would take as long again to compare, and seldom be better.
    """
    for given in (replace(options, chunk_tokens=dense.chunk_tokens), options):
        with contextlib.suppress(MemoryPlanError):
            return resolved(packed, given)
    return None


def _pays(packed: Plan, dense: Plan, options: Options, hardware: Hardware | None) -> bool:
    """Whether a packed plan is faster than a dense one by more than predictions are off.

    Without rates the bytes that are not resident decide, as all of them cross the link. A short
    cache would take more host memory packed, with its room for pages that do not pack.
    """
    tokens = dense.context_tokens or 0
    if packed.kv_host_bytes(tokens) > dense.kv_host_bytes(tokens):
        return False
    steps: list[float] = []
    prompts: list[float] = []
    for plan in (packed, dense):
        answer = in_answer(plan, options, hardware)
        if hardware is None:
            steps.append(answer.streamed_bytes(tokens))
            continue
        predictor = Predictor(plan.shape, hardware)
        placement = placement_with(plan, answer)
        steps.append(predictor.decode_s(placement, tokens))
        prompts.append(predictor.prefill_s(placement, tokens))
    late = bool(prompts) and prompts[0] > _PROMPT_SHARE * prompts[1]
    return steps[0] < steps[1] and steps[0] <= _STEP_SHARE * steps[1] and not late
