"""Every method side by side: bytes, the longest context, the choice, and what to change."""

from dataclasses import replace
from functools import cache

import pytest

from headinfer.estimate.accounting import AccountingKind
from headinfer.estimate.choose import choose
from headinfer.estimate.gpus import split_plans
from headinfer.estimate.machines import HARDWARE
from headinfer.estimate.methods import method_plans, papers_methods
from headinfer.estimate.presets import preset_shape
from headinfer.estimate.situation import MethodPlan, Situation
from headinfer.plan.memory import STAGING_BUFFERS
from headinfer.plan.options import Options

GIB = 2**30
RUNTIME = 5 * GIB // 4
NAMES = [
    *("standard", "chunked-prefill", "kv-4bit", "layer-wise"),
    *("head-wise-8", "head-wise-4", "head-wise-2", "head-wise-1"),
    *("adaptive", "head-wise-sparse", "bounded", "resident"),
]
SITUATION = Situation(
    shape=preset_shape("llama-3-8b"),
    hardware=HARDWARE["rtx-4090"],
    context_tokens=2**20,
    device_memory_bytes=24 * GIB,
    host_memory_bytes=1024 * GIB,
)
PAPER = replace(SITUATION, kind=AccountingKind.PAPER)


@cache  # planning ours takes half a second
def plans_of(situation: Situation) -> dict[str, MethodPlan]:
    return {plan.method: plan for plan in method_plans(situation)}


def plan_of(situation: Situation, name: str) -> MethodPlan:
    """One method's plan; those of the paper's methods need none of ours."""
    of_paper = {plan.method: plan for plan in papers_methods(situation)}
    return of_paper.get(name) or plans_of(situation)[name]


def test_every_method_is_there_and_adds_up() -> None:
    plans = plans_of(SITUATION)
    assert list(plans) == NAMES
    for plan in plans.values():
        parts = plan.weights_bytes + plan.kv_device_bytes + plan.activation_bytes + RUNTIME
        assert plan.runtime_bytes == RUNTIME
        assert plan.total_device_bytes == parts
        assert plan.fits == (parts <= 24 * GIB and plan.kv_host_bytes <= 1024 * GIB)
        assert plan.prefill_s > 0
        assert plan.decode_s_per_token > 0


def test_the_papers_accounting_knows_no_runtime() -> None:
    plans = plans_of(PAPER)
    assert {plan.runtime_bytes for plan in plans.values()} == {0}
    resident = plans["resident"]
    parts = resident.weights_bytes + resident.kv_device_bytes + resident.activation_bytes
    assert resident.total_device_bytes == parts == 24 * GIB
    longest = {
        situation.kind: plans_of(replace(situation, device_memory_bytes=int(15.5 * GIB)))[
            "resident"
        ].max_context_tokens
        for situation in (PAPER, SITUATION)
    }
    assert longest == {AccountingKind.PAPER: 8 * 2**20, AccountingKind.OURS: 0}


@pytest.mark.covering(most=2)
@pytest.mark.parametrize("sparsity", [0.25, 0.5, 0.75])
def test_heads_that_stream_take_their_share_of_memory_and_time(sparsity: float) -> None:
    plans = plans_of(replace(SITUATION, streaming=Options(sparsity=sparsity)))
    sparse, full = plans["head-wise-sparse"], plans["resident"]
    left = pytest.approx(1 - sparsity)
    assert sparse.kv_host_bytes / full.kv_host_bytes == left
    assert sparse.max_context_tokens is not None
    assert full.max_context_tokens is not None
    assert full.max_context_tokens / sparse.max_context_tokens == left
    assert sparse.decode_s_per_token < (1 - sparsity) * full.decode_s_per_token
    paper = plans_of(replace(PAPER, streaming=Options(sparsity=sparsity)))
    assert paper["head-wise-sparse"].kv_host_bytes / paper["resident"].kv_host_bytes == left


def test_the_approximate_method_is_never_chosen() -> None:
    here = replace(SITUATION, host_memory_bytes=80 * GIB)
    plans = method_plans(here)
    assert [plan.method for plan in plans if plan.fits] == ["head-wise-sparse"]
    choice = choose(here, plans)
    assert choice.plan is None


def test_a_model_with_few_heads_has_few_methods() -> None:
    plans = plans_of(replace(SITUATION, shape=preset_shape("qwen2-7b")))
    assert "head-wise-8" not in plans
    assert plans["layer-wise"].tile_heads == 4


@pytest.mark.parametrize("heads", [8, 4, 2, 1])
def test_tiles_on_the_device_are_two_in_the_paper_and_three_here(heads: int) -> None:
    tile = heads * 2**20 * 2 * 128 * 2
    assert plans_of(PAPER)[f"head-wise-{heads}"].kv_device_bytes == 2 * tile
    ours = plans_of(SITUATION)[f"head-wise-{heads}"].kv_device_bytes
    assert STAGING_BUFFERS * tile < ours < STAGING_BUFFERS * tile + 0.1 * GIB


@pytest.mark.covering
@pytest.mark.parametrize("kind", list(AccountingKind))
@pytest.mark.parametrize("name", NAMES)
def test_the_longest_context_fits_and_one_token_more_does_not(
    kind: AccountingKind, name: str
) -> None:
    here = replace(SITUATION, kind=kind, host_memory_bytes=100 * GIB)
    longest = plans_of(here)[name].max_context_tokens
    assert longest
    assert plan_of(replace(here, context_tokens=longest), name).fits
    assert not plan_of(replace(here, context_tokens=longest + 1), name).fits


def test_adaptive_takes_as_many_heads_as_fit() -> None:
    heads = [
        plan_of(
            replace(PAPER, context_tokens=tokens, device_memory_bytes=20 * GIB), "adaptive"
        ).tile_heads
        for tokens in (500 * 1024, 1000 * 1024, 2000 * 1024, 4000 * 1024)
    ]
    assert heads == [8, 4, 2, 1]  # as in the paper's section on adaptive grouping


def test_everything_is_resident_while_it_fits() -> None:
    here = replace(SITUATION, context_tokens=40 * 1024)
    choice = choose(here, method_plans(here))
    assert choice.plan is not None
    assert choice.plan.method == "resident"
    assert choice.plan.streamed_bytes == 0
    assert "stays in GPU memory" in choice.why[0]


def test_what_does_not_fit_is_streamed_beside_what_does() -> None:
    choice = choose(SITUATION, method_plans(SITUATION))
    plan = choice.plan
    assert plan is not None
    assert 0 < plan.streamed_bytes == plan.kv_total_bytes - plan.resident_bytes
    assert plan.kv_host_bytes == plan.kv_total_bytes
    assert 0 <= 24 * GIB - plan.total_device_bytes < 2**18  # one token is 128 KiB
    assert any("KV heads x " in line for line in choice.why)
    assert any("limited by the link" in line for line in choice.why)


@pytest.mark.covering(most=1)
@pytest.mark.parametrize(
    "changes",
    [
        {"context_tokens": 2**24},
        {"host_memory_bytes": GIB},
        {"device_memory_bytes": 14 * GIB},
        {"device_memory_bytes": 14 * GIB, "host_memory_bytes": GIB},
    ],
)
def test_where_nothing_fits_each_change_helps(changes: dict[str, int]) -> None:
    here = replace(SITUATION, **changes)
    choice = choose(here, method_plans(here))
    assert choice.plan is None
    assert choice.why
    assert choice.changes
    for change in choice.changes:
        if change.gpus is not None:
            assert split_plans(here, [here.device_memory_bytes])[-1].fits, change.line
            continue
        wanted = {
            name: value
            for name in ("device_memory_bytes", "host_memory_bytes", "context_tokens")
            if (value := getattr(change, name)) is not None
        }
        then = replace(here, **wanted)
        assert choose(then, method_plans(then)).plan is not None, change.line


def test_without_a_link_there_is_one_memory() -> None:
    cpu = replace(SITUATION.hardware, link_bytes_per_s=None, link_back_bytes_per_s=None)
    here = replace(SITUATION, hardware=cpu, context_tokens=2**15)
    plans = plans_of(here)
    assert list(plans) == ["standard", "chunked-prefill", "kv-4bit", "head-wise-sparse", "bounded"]
    assert plans["bounded"].kv_host_bytes == 0
    assert plans["bounded"].kv_device_bytes == 4 * GIB
    longest = plans["bounded"].max_context_tokens
    assert longest
    assert plans_of(replace(here, context_tokens=longest))["bounded"].fits
    assert choose(here, method_plans(here)).plan == plans["bounded"]


def test_a_model_of_windows_alone_has_nothing_to_offload() -> None:
    gemma = preset_shape("gemma-2-9b")
    windows = tuple(layer for layer in gemma.layers if layer.window_tokens)
    plans = plans_of(replace(SITUATION, shape=replace(gemma, layers=windows)))
    assert plans["resident"].max_context_tokens is None
    assert plans["resident"].kv_total_bytes == 0


def test_what_the_cpu_attends_is_told_and_not_counted_as_streamed() -> None:
    here = replace(SITUATION, hardware=replace(SITUATION.hardware, measured=True))
    choice = choose(here, method_plans(here))
    plan = choice.plan
    assert plan is not None
    rest = plan.kv_total_bytes - plan.resident_bytes
    assert plan.host_attended_bytes == pytest.approx(plan.host_share * rest)
    assert plan.streamed_bytes + plan.host_attended_bytes == rest
    assert any("In decode steps the CPU attends" in line for line in choice.why)


def test_a_step_streams_what_its_answers_residents_leave() -> None:
    here = replace(SITUATION, context_tokens=128 * 1024)
    choice = choose(here, method_plans(here))
    plan = choice.plan
    assert plan is not None
    assert plan.answer_resident_bytes > plan.resident_bytes > 0
    assert plan.streamed_bytes == plan.kv_total_bytes - plan.answer_resident_bytes
    assert plan.streamed_bytes / here.hardware.link_bytes_per_s <= plan.decode_s_per_token
    told = next(line for line in choice.why if "while it answers" in line)
    assert f"{plan.answer_resident_bytes / GIB:.2f} GiB of KV stay there" in told


def test_packed_steps_of_an_answer_take_the_packed_share_of_dense_ones() -> None:
    """With the prompt's residents alone they would take 0.92 of it."""
    dense = replace(SITUATION, hardware=HARDWARE["h100-80gb"], context_tokens=100 * 2**10)
    packed = replace(dense, shape=dense.shape.packed)
    times = [plans_of(each)["resident"].decode_s_per_token for each in (packed, dense)]
    assert times[0] / times[1] == pytest.approx(packed.shape.packed_share, abs=0.02)
