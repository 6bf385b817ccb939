"""Whether a plan has packed tokens where users leave it open: by predicted times, or by bytes."""

import functools
from dataclasses import replace
from typing import Any

import pytest

from headinfer.errors import MemoryPlanError
from headinfer.estimate.machines import preset_hardware
from headinfer.estimate.presets import preset_shape
from headinfer.plan.form_choice import with_chosen_form
from headinfer.plan.format import Format
from headinfer.plan.hardware import Hardware
from headinfer.plan.options import Options
from headinfer.plan.plan import Plan
from headinfer.plan.resolve import resolve
from headinfer.plan.shape import ModelShape

LLAMA = preset_shape("llama-3-8b")
RTX_4090 = preset_hardware("rtx-4090")
K, GIB = 2**10, 2**30


def chosen(
    tokens: int | None,
    hardware: Hardware | None = RTX_4090,
    *,
    shape: ModelShape = LLAMA,
    device: str = "cuda",
    works: bool = True,
    **given: Any,
) -> Plan:
    options = Options(**{"device_memory_bytes": 24 * GIB, **given})
    resolved = functools.partial(resolve, device=device, context_tokens=tokens, hardware=hardware)
    return with_chosen_form(shape, options, hardware, resolved, lambda: works)


def form(*given: Any, **more: Any) -> Format:
    return chosen(*given, **more).shape.host_format


def test_long_contexts_are_packed_and_what_is_resident_is_dense() -> None:
    assert form(128 * K) is form(2**20) is Format.PACKED
    assert form(32 * K) is Format.DENSE
    assert chosen(32 * K) == resolve(
        LLAMA,
        Options(device_memory_bytes=24 * GIB),
        device="cuda",
        context_tokens=32 * K,
        hardware=RTX_4090,
    )
    assert form(400 * K, device_memory_bytes=80 * GIB) is Format.DENSE


def test_residents_of_an_answer_count() -> None:
    # At 64K an answer has all but a few tokens resident, so that packing would spare little.
    assert form(64 * K) is Format.DENSE
    assert form(64 * K, resident_tokens=0) is Format.PACKED
    assert form(80 * K) is Format.PACKED


def test_without_rates_the_bytes_that_are_streamed_decide() -> None:
    assert form(128 * K, None) is Format.PACKED
    assert form(32 * K, None) is Format.DENSE
    assert form(56 * K, None) is Format.DENSE  # an answer has all tokens resident in both forms


def test_a_short_cache_takes_no_more_host_memory_than_a_dense_one() -> None:
    # Pages that do not pack have room for 137 MiB, a quarter of 4.6K tokens.
    assert form(4 * K, None, resident_tokens=0) is Format.DENSE
    assert form(8 * K, None, resident_tokens=0) is Format.PACKED


def test_a_machine_that_gains_little_is_dense() -> None:
    fast = replace(RTX_4090, link_bytes_per_s=1e12, link_back_bytes_per_s=1e12)
    assert form(128 * K, fast) is Format.DENSE


def test_packed_tokens_pass_in_the_chunks_of_dense_ones() -> None:
    h100, tokens = preset_hardware("h100-80gb"), 128 * K
    assert chosen(tokens, h100).chunk_tokens == chosen(tokens, h100, kv_cache="dense").chunk_tokens
    assert form(tokens, h100) is form(tokens, h100, chunk_tokens=4 * K) is Format.PACKED


@pytest.mark.parametrize(("chunk_tokens", "wanted"), [(8, Format.PACKED), (4, Format.DENSE)])
def test_a_prompt_that_would_be_late_is_dense(chunk_tokens: int, wanted: Format) -> None:
    """Packed tokens take more device memory, which may leave room for shorter chunks alone."""
    h100, options = preset_hardware("h100-80gb"), Options(device_memory_bytes=24 * GIB)

    def resolved(shape: ModelShape, given: Options) -> Plan:
        if shape.packs:
            if given.chunk_tokens != "auto":
                raise MemoryPlanError("no room")
            given = replace(given, chunk_tokens=chunk_tokens * K)
        return resolve(shape, given, device="cuda", context_tokens=400 * K, hardware=h100)

    assert with_chosen_form(LLAMA, options, h100, resolved).shape.host_format is wanted


@pytest.mark.parametrize(
    "given",
    [
        {"kv_cache": "dense"},
        {"works": False},
        {"device": "cpu"},
        {"shape": replace(LLAMA, layers=(replace(LLAMA.layers[0], key_dim=24),))},
    ],
    ids=["asked", "broken", "cpu", "dims"],
)
def test_what_cannot_be_packed_is_dense(given: dict[str, Any]) -> None:
    assert form(128 * K, **given) is Format.DENSE


def test_what_is_unknown_or_was_asked_for_stays() -> None:
    assert form(None) is Format.DENSE
    packed = LLAMA.packed
    assert form(32 * K, shape=packed, kv_cache="packed") is Format.PACKED
    int8 = LLAMA.stored_as(Format.INT8)
    assert form(128 * K, shape=int8, kv_cache="int8") is Format.INT8


def test_packed_tokens_that_no_plan_fits_leave_dense_ones() -> None:
    def resolved(shape: ModelShape, options: Options) -> Plan:
        if shape.packs:
            raise MemoryPlanError("no room")
        return resolve(shape, options, device="cuda", context_tokens=128 * K)

    options = Options(device_memory_bytes=24 * GIB)
    assert not with_chosen_form(LLAMA, options, None, resolved).shape.packs
