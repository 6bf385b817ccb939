"""Plans for answers: residents where the activations of a prompt's chunks were."""

from dataclasses import replace
from typing import Any

import pytest

from headinfer.estimate.machines import HARDWARE
from headinfer.estimate.presets import preset_shape
from headinfer.plan.answering import SHORT_CALL_TOKENS, answering
from headinfer.plan.below_host import InBlocks
from headinfer.plan.format import Format
from headinfer.plan.growing import outgrows
from headinfer.plan.memory import activation_bytes, resident_bytes
from headinfer.plan.narrow import for_prompts, without_residents
from headinfer.plan.options import Options
from headinfer.plan.plan import Plan
from headinfer.plan.predict import Predictor
from headinfer.plan.resolve import resolve
from headinfer.plan.shape import ModelShape
from headinfer.plan.whole import passing_whole
from shapes import LLAMA_3_8B

TOKENS = 100 * 1024


def planned(
    shape: Any = LLAMA_3_8B, tokens: int = TOKENS, device: str = "cuda", **values: Any
) -> tuple[Plan, Options]:
    options = Options.parse(**{"device_memory": "24GiB", "chunk_tokens": "8K", **values})
    return resolve(shape, options, device=device, context_tokens=tokens), options


@pytest.mark.parametrize(
    ("shape", "batch"),
    [(LLAMA_3_8B, 1), (LLAMA_3_8B, 2), (preset_shape("gemma-2-9b"), 1)],
    ids=["llama", "two-rows", "gemma"],
)
def test_all_that_short_calls_leave_holds_residents(shape: Any, batch: int) -> None:
    options = Options.parse(device_memory="26GiB", chunk_tokens="4K")
    plan = resolve(shape, options, device="cuda", batch=batch, context_tokens=TOKENS)
    answer = answering(plan, options)
    assert answer is not None
    assert answer.chunk_tokens == SHORT_CALL_TOKENS
    assert answer.activation_bytes == activation_bytes(
        shape, chunk_tokens=1024, tile_heads=plan.tile_heads, batch=batch, device="cuda"
    )
    left = (plan.device_memory_bytes or 0) - answer.total_device_bytes
    assert 0 <= left < 2 * resident_bytes(shape, resident_tokens=1, batch=batch)
    gained = answer.resident_bytes - plan.resident_bytes
    assert gained > 0.9 * (plan.activation_bytes - answer.activation_bytes)
    same = ("tile_heads", "tile_tokens", "page_tokens", "staging_bytes", "tail_bytes", "host_share")
    assert all(getattr(plan, name) == getattr(answer, name) for name in same)


@pytest.mark.parametrize("form", [Format.PACKED, Format.INT8, Format.FP8])
@pytest.mark.parametrize("chunk_tokens", ["6K", "8K", "16K"])
def test_an_answer_of_packed_tokens_needs_no_more_of_host_memory(
    form: Format, chunk_tokens: str
) -> None:
    """With the room for chunks of its own there would be a block more, of another size."""
    plan, options = planned(LLAMA_3_8B.stored_as(form), chunk_tokens=chunk_tokens)
    answer = answering(plan, options)
    assert answer is not None
    assert answer.resident_tokens % 64 == 0
    assert answer.packed_bytes < plan.packed_bytes
    assert 0 <= (plan.device_memory_bytes or 0) - answer.total_device_bytes < 2**23
    assert answer.raw_room == plan.raw_room
    assert answer.kv_host_bytes(TOKENS) == plan.kv_host_bytes(TOKENS)
    own = replace(answer, prompt_plan=None)
    assert own.raw_room != plan.raw_room


@pytest.mark.parametrize("shape", [LLAMA_3_8B, LLAMA_3_8B.packed], ids=["dense", "packed"])
def test_an_answer_at_100k_tokens_streams_a_seventh_less(shape: ModelShape) -> None:
    plan, options = planned(shape)
    answer = answering(plan, options)
    assert answer is not None
    before, after = (each.streamed_bytes(TOKENS) for each in (plan, answer))
    assert 0.80 < after / before < 0.86


@pytest.mark.parametrize(
    "values",
    [
        {"device_memory": None},
        {"device_memory": "48GiB"},  # all is resident
        {"resident_tokens": 1000},
        {"resident_tokens": 0},
        {"draft_tokens": 1024},
        {"chunk_tokens": "1K"},
        {"tokens": 2**20},  # a fiftieth would be spared
        {"device": "cpu", "device_memory": None},
        {"shape": replace(LLAMA_3_8B, ranks=2)},
    ],
    ids=["limitless", "all", "given", "none", "drafts", "short", "long", "cpu", "ranks"],
)
def test_there_is_none_where_it_would_gain_little(values: dict[str, Any]) -> None:
    plan, options = planned(**values)
    assert answering(plan, options) is None


@pytest.mark.parametrize(("tokens", "helps"), [(64 * 1024, False), (100 * 1024, True)])
def test_an_answer_leaves_the_cpu_out_where_the_link_is_sooner(tokens: int, helps: bool) -> None:
    machine = replace(
        HARDWARE["h100-80gb"],
        measured=True,
        link_bytes_per_s=54e9,
        host_bytes_per_s=120e9,
        host_shared_bytes_per_s=150e9,
        host_attention_bytes_per_s=110e9,
    )
    options = Options.parse(device_memory="24GiB", chunk_tokens="16K")
    plan = resolve(LLAMA_3_8B, options, device="cuda", context_tokens=tokens, hardware=machine)
    assert plan.host_share > 0.5
    answer = answering(plan, options, machine)
    assert answer is not None
    assert answer.streamed_bytes(tokens) > 0
    assert (answer.host_share > 0) is answer.host_share_adapts is helps
    assert (answer.verify_host_share is not None) is helps
    assert not outgrows(answer, tokens)
    assert outgrows(answer, tokens + 1) is not helps  # beyond that the CPU may be worth asking
    predictor = Predictor(LLAMA_3_8B, machine)
    steps_s = [
        predictor.decode_s(replace(answer.placement, host_share=share), tokens)
        for share in (0.0, plan.host_share)
    ]
    assert steps_s.index(min(steps_s)) == helps
    half = Options.parse(device_memory="24GiB", chunk_tokens="16K", host_attention=0.5)
    plan = resolve(LLAMA_3_8B, half, device="cuda", context_tokens=tokens, hardware=machine)
    given = answering(plan, half, machine)
    assert given is not None
    assert given.host_share == 0.5  # as the user wants it


def test_a_call_that_passed_whole_gives_its_memory_too() -> None:
    plan, options = planned(chunk_tokens="1K")
    whole = passing_whole(plan, options, 8192)
    answer = answering(whole, options)
    assert answer is not None
    assert answer.whole_tokens == 0
    assert answer.resident_tokens > whole.resident_tokens
    assert for_prompts(answer) == whole


def test_the_way_back_keeps_what_changed_above_a_disk() -> None:
    plan, options = planned()
    answer = answering(plan, options)
    assert answer is not None
    assert for_prompts(plan) is plan
    lower = replace(answer, disk_host_blocks=7, disk_staging_bytes=9)
    assert for_prompts(lower) == replace(plan, disk_host_blocks=7, disk_staging_bytes=9)
    bare = without_residents(lower)
    assert (bare.resident_tokens, bare.resident_bytes, bare.disk_host_blocks) == (0, 0, 7)
    assert bare.prompt_plan is None


def chunk_tokens(
    tokens: int = TOKENS,
    shape: ModelShape = LLAMA_3_8B,
    beside: tuple[ModelShape, ...] = (),
    **values: Any,
) -> int:
    """Return the tokens of a chunk that are chosen on an H100, with other layers elsewhere."""
    hardware = HARDWARE["h100-80gb"]
    options = Options.parse(**{"device_memory": "24GiB", **values})
    plan = resolve(
        *(shape, options),
        device="cuda",
        context_tokens=tokens,
        hardware=hardware,
        in_blocks=InBlocks(beside=beside),
    )
    return plan.chunk_tokens


def test_chunks_of_a_long_prompt_are_large_where_its_answer_has_their_memory() -> None:
    assert chunk_tokens() == 16384
    assert chunk_tokens(chunk_tokens="8K") == 8192
    assert chunk_tokens(shape=LLAMA_3_8B.packed) == 16384


@pytest.mark.parametrize(
    "values",
    [
        {"tokens": 50 * 1024},  # all of which are resident with chunks of 8K
        {"resident_tokens": 40000},
        {"resident_tokens": 0},
        {"draft_tokens": "auto"},
        {"shape": replace(LLAMA_3_8B, ranks=2)},
        {"beside": (LLAMA_3_8B,)},  # where the second device waits for a whole chunk
    ],
    ids=["all", "given", "none", "drafts", "ranks", "devices"],
)
def test_chunks_are_no_larger_where_its_answer_has_not(values: dict[str, Any]) -> None:
    assert chunk_tokens(**values) <= 8192


@pytest.mark.parametrize("shape", [LLAMA_3_8B, LLAMA_3_8B.packed], ids=["dense", "packed"])
def test_predicted_decode_steps_are_those_of_the_answer(shape: ModelShape) -> None:
    plan, options = planned(shape)
    answer = answering(plan, options)
    assert answer is not None
    predictor = Predictor(shape, HARDWARE["h100-80gb"])
    placement = replace(plan.placement, answer=answer.placement)
    answers_s = predictor.decode_s(answer.placement, TOKENS)
    assert predictor.decode_s(placement, TOKENS) == answers_s
    assert predictor.decode_s(plan.placement, TOKENS) > answers_s
    prefill_s = predictor.prefill_s(plan.placement, TOKENS)
    assert predictor.prefill_s(placement, TOKENS) == prefill_s
