"""How many tokens drafts attend, and that plans without drafts are as ever."""

import dataclasses
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headinfer.plan import memory
from headinfer.plan.options import Options
from headinfer.plan.plan import Plan
from headinfer.plan.resolve import resolve
from shapes import model_shape

SHAPE = model_shape(layers=4, kv_heads=2)


def planned(
    drafts: Any, context: int | None, device: str = "cuda", batch: int = 1, **options: Any
) -> Plan:
    options = {"draft_tokens": drafts, **options}
    return resolve(
        SHAPE, Options.parse(**options), device=device, batch=batch, context_tokens=context
    )


def room(plan: Plan) -> int:
    """Return the bytes that residents and drafts could have."""
    held = plan.total_device_bytes - plan.resident_bytes - plan.draft_bytes
    return (plan.device_memory_bytes or 0) - held


@pytest.mark.parametrize("device", ["cpu", "cuda", "simulated"])
@pytest.mark.parametrize("context", [None, 900, 64 * 1024])
def test_a_plan_without_drafts_is_as_ever(device: str, context: int | None) -> None:
    given = planned(0, context, device)
    assert (given.draft_tokens, given.draft_bytes) == (0, 0)
    assert "draft" not in str(given)
    assert given == resolve(SHAPE, Options(), device=device, context_tokens=context)


@pytest.mark.parametrize(
    ("context", "wanted"),
    [(None, 256), (1024, 0), (1025, 256), (2048, 256), (4096, 512), (80_000, 10_000)],
)
@pytest.mark.parametrize("device", ["cpu", "simulated"])
def test_auto_is_an_eighth_of_the_context(device: str, context: int | None, wanted: int) -> None:
    assert planned("auto", context, device).draft_tokens == wanted


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    drafts=st.sampled_from(["auto", 5, 300, 5000, 10**6]),
    context=st.integers(1000, 300_000),
    spare=st.integers(0, 40 * 2**20),
    resident=st.sampled_from(["auto", 0, 700]),
)
def test_drafts_have_memory_that_residents_would_have(
    drafts: Any, context: int, spare: int, resident: Any
) -> None:
    least = planned(0, context, resident_tokens=0, chunk_tokens=64, tile_tokens=64)
    options: dict[str, Any] = {"chunk_tokens": 64, "tile_tokens": 64, "resident_tokens": resident}
    options["device_memory"] = least.total_device_bytes + spare
    plan, plain = planned(drafts, context, **options), planned(0, context, **options)
    assert plan.fits
    assert plan.total_device_bytes <= plain.device_memory_bytes
    size = memory.draft_bytes(SHAPE, draft_tokens=plan.draft_tokens, batch=1)
    assert plan.draft_bytes == size
    assert plan.arena_bytes >= plan.draft_bytes + plan.resident_bytes
    if drafts == "auto":
        assert plan.draft_bytes <= room(plan) // 2
        assert plan.draft_tokens == 0 or 256 <= plan.draft_tokens <= max(context // 8, 256)
        if plain.resident_tokens >= context:
            assert plan == plain
    else:
        assert plan.draft_tokens <= drafts
        if plan.draft_tokens < drafts:  # as many as there is room for, or too few to be worth it
            most = memory.draft_tokens(SHAPE, room(plan), batch=1)
            assert plan.draft_tokens == most or most < 256


def test_rows_and_layers_that_cannot_draft_have_no_copies() -> None:
    assert planned(300, 9000, batch=2).draft_tokens == 0
    shape = model_shape(layers=4, window_tokens=24)
    windows = dataclasses.replace(shape, layers=(shape.layers[0],) * 4)
    assert resolve(windows, Options(draft_tokens=300), device="cpu").draft_tokens == 0


def test_a_plan_says_what_drafts_attend() -> None:
    assert "drafts attend 300 tokens of each layer, copied: " in str(planned(300, 9000))
