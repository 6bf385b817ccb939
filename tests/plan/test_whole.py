"""Plans for calls that cannot pass in chunks."""

import pytest

from headinfer.errors import MemoryPlanError
from headinfer.plan.options import Options
from headinfer.plan.plan import Plan
from headinfer.plan.resolve import resolve
from headinfer.plan.whole import passing_whole
from shapes import LLAMA_3_8B

GIB = 2**30
TOKENS = 32768


def plan_within(budget: int | None, context_tokens: int = 2**17) -> tuple[Plan, Options]:
    options = Options(device_memory_bytes=budget)
    return resolve(LLAMA_3_8B, options, device="cuda", context_tokens=context_tokens), options


def test_a_call_no_longer_than_a_chunk_changes_nothing() -> None:
    plan, options = plan_within(40 * GIB)
    assert passing_whole(plan, options, plan.chunk_tokens) is plan


def test_residents_are_given_up_before_anything_else() -> None:
    plan, options = plan_within(30 * GIB)
    whole = passing_whole(plan, options, TOKENS)
    assert whole.activation_bytes > plan.activation_bytes
    assert 0 < whole.resident_tokens < plan.resident_tokens
    assert whole.total_device_bytes <= 30 * GIB
    assert (whole.chunk_tokens, whole.tile_tokens) == (plan.chunk_tokens, plan.tile_tokens)
    assert passing_whole(whole, options, TOKENS) is whole


def test_then_the_settings_left_open_shrink() -> None:
    plan, options = plan_within(None)
    least = passing_whole(plan, options, TOKENS).total_device_bytes - plan.staging_bytes // 2
    plan, options = plan_within(least)
    whole = passing_whole(plan, options, TOKENS)
    assert whole.total_device_bytes <= least
    assert whole.staging_bytes < plan.staging_bytes


def test_what_does_not_fit_is_refused_with_what_it_needs() -> None:
    plan, options = plan_within(18 * GIB)
    with pytest.raises(MemoryPlanError, match=r"of 18.00 GiB does not hold 1M tokens at once"):
        passing_whole(plan, options, 2**20)


def test_without_a_budget_all_fits() -> None:
    plan, options = plan_within(None)
    assert passing_whole(plan, options, 2**20).whole_tokens == 2**20
