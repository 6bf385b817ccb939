"""Tokens that are not dense in CPU memory, on several GPUs: as attached, and as on one GPU."""

from dataclasses import replace

import pytest
import torch

import headinfer
from headinfer.estimate.choose_split import choose_split
from headinfer.estimate.config import shape_from_config
from headinfer.estimate.gpus import split_plans
from headinfer.estimate.machines import HARDWARE
from headinfer.estimate.methods import RESIDENT, ROUNDED, method_plans
from headinfer.estimate.presets import preset_shape
from headinfer.estimate.situation import Situation
from headinfer.estimate.split_plan import Split, SplitPlan
from headinfer.plan.format import Format
from parted import spread
from tiny_models import tiny_model

GIB, K = 2**30, 1024
FORMS = (Format.PACKED, Format.INT8, Format.FP8)


def situation(form: Format, *, model: str = "llama-3-8b", k_tokens: int = 400) -> Situation:
    return Situation(
        shape=preset_shape(model),
        hardware=HARDWARE["h100-80gb"],
        context_tokens=k_tokens * K,
        device_memory_bytes=24 * GIB,
        host_memory_bytes=256 * GIB,
        host_format=form,
        chunk_tokens=4 * K,
    )


def in_form(here: Situation, gpus: int) -> dict[Split, SplitPlan]:
    """Return the plans of the method whose tokens have the form."""
    name = ROUNDED.get(here.host_format, RESIDENT)
    plans = split_plans(here, [here.device_memory_bytes] * gpus)
    return {plan.split: plan for plan in plans if plan.method == name}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("devices", [1, 2, 3])
def test_layers_take_what_an_attachment_over_as_many_devices_takes(
    form: Format, devices: int
) -> None:
    layers, tokens, chunk_tokens = 6, 64 * K + 17, 256
    model = tiny_model(
        "llama3", num_hidden_layers=layers, num_key_value_heads=2, num_attention_heads=2
    ).to(torch.bfloat16)
    shape = shape_from_config(model.config.to_dict(), name="tiny", dtype="bfloat16")
    here = replace(situation(form), shape=shape, context_tokens=tokens, chunk_tokens=chunk_tokens)
    planned = in_form(here, devices)[Split.LAYERS if devices > 1 else Split.NONE]
    assert [use.layers for use in planned.uses] == [layers // devices] * devices
    with headinfer.attach(
        model,
        device="simulated",
        simulated_device=spread(*sorted([*range(devices)] * (layers // devices))),
        kv_cache=form.value,
        chunk_tokens=chunk_tokens,
    ) as offload:
        parts = offload.plan.of_devices
        rooms = [part.raw_page_bytes for part in parts]
        assert rooms == sorted(set(rooms))  # a later GPU has room for more
        assert [use.raw_page_bytes for use in planned.uses] == rooms
        assert [use.kv_host_bytes for use in planned.uses] == [
            part.kv_host_bytes(tokens) for part in parts
        ]
        assert planned.kv_host_bytes == offload.plan.kv_host_bytes(tokens)


@pytest.mark.covering
@pytest.mark.parametrize("form", [Format.DENSE, Format.PACKED, Format.INT8])
@pytest.mark.parametrize("k_chunk_tokens", [4, 16])
def test_one_gpu_is_planned_as_without_asking_for_several(
    form: Format, k_chunk_tokens: int
) -> None:
    """With chunks of 16K tokens an answer has more resident tokens than its prompt."""
    here = replace(situation(form), chunk_tokens=k_chunk_tokens * K)
    for split in split_plans(here, [here.device_memory_bytes]):
        alone = next(plan for plan in method_plans(here) if plan.method == split.method)
        assert split.kv_host_bytes == alone.kv_host_bytes
        assert split.max_context_tokens == alone.max_context_tokens
        assert split.fullest.total_bytes == alone.total_device_bytes
        assert split.fullest.resident_bytes == alone.resident_bytes
        assert split.streamed_bytes == alone.streamed_bytes
        assert split.decode_s_per_token == pytest.approx(alone.decode_s_per_token)
        assert split.prefill_s == pytest.approx(alone.prefill_s, rel=5e-3)


def test_fewer_bytes_cross_the_links_and_lie_in_cpu_memory() -> None:
    form = Format.PACKED
    dense, formed = (in_form(situation(each), 2) for each in (Format.DENSE, form))
    share = situation(form).in_its_format().shape.packed_share
    assert share < 0.78
    for split in (Split.LAYERS, Split.HEADS):
        ours = formed[split]
        home_bytes = ours.kv_host_bytes - ours.raw_page_bytes
        assert home_bytes == pytest.approx(share * dense[split].kv_host_bytes)
        faster = ours.decode_s_per_token / dense[split].decode_s_per_token
        assert share < faster < 1.05 * share
        assert ours.streamed_bytes == pytest.approx(share * dense[split].streamed_bytes, rel=0.02)


def test_the_longest_context_leaves_room_for_pages_that_do_not_pack() -> None:
    here = replace(situation(Format.PACKED), host_memory_bytes=64 * GIB)
    plans = in_form(here, 4)
    for split in (Split.LAYERS, Split.HEADS):
        longest = plans[split].max_context_tokens
        assert longest
        for more in (0, 1):
            there = replace(here, context_tokens=longest + more)
            assert in_form(there, 4)[split].fits is not bool(more)
    # Heads have room for a lead alone, and layers also for the chunks of the GPUs before them.
    assert plans[Split.LAYERS].raw_page_bytes > 5 * plans[Split.HEADS].raw_page_bytes


def test_weights_in_cpu_memory_leave_that_room_to_the_kv_cache() -> None:
    here = replace(
        situation(Format.PACKED, model="llama-3-70b", k_tokens=32), host_memory_bytes=64 * GIB
    )
    plan = in_form(here, 1)[Split.NONE]
    assert plan.fits
    assert plan.disk_bytes
    layer_bytes = here.shape.layer_bytes
    most = here.host_room_bytes - plan.kv_host_bytes
    output = here.shape.output_bytes  # through which what lies on the disk is read
    assert plan.weights_host_bytes == (most - output) // layer_bytes * layer_bytes
    assert "--kv-cache packed" in choose_split(here, [plan]).command


def test_rounded_tokens_are_never_chosen() -> None:
    here = situation(Format.INT8)
    plans = split_plans(here, [24 * GIB] * 2)
    assert [plan.method for plan in plans] == ["standard", "headinfer-int8", "resident"] * 3
    choice = choose_split(here, plans)
    assert choice.plan is not None
    assert choice.plan.method == RESIDENT
    assert "--kv-cache" not in choice.command
