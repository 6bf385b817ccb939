"""Several GPUs: what lies where, and how long it takes, against arithmetic by hand."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
import transformers
from transformers.integrations.accelerate import get_balanced_memory, infer_auto_device_map

from headinfer.errors import OptionError
from headinfer.estimate.choose_split import choose_split
from headinfer.estimate.gpus import split_plans
from headinfer.estimate.machines import HARDWARE
from headinfer.estimate.pipeline import pipeline
from headinfer.estimate.presets import PRESETS, preset_shape
from headinfer.estimate.situation import Situation
from headinfer.estimate.split_plan import Split, SplitPlan
from headinfer.estimate.split_times import heads_times, layers_times
from headinfer.estimate.spread import by_heads, by_layers
from headinfer.integration.even_map import even_map
from headinfer.plan.hardware import Hardware
from headinfer.plan.memory import weights_room_bytes
from headinfer.plan.predict import Predictor
from headinfer.plan.shape import ModelShape
from headinfer.plan.step_time import Placement

GIB, K = 2**30, 1024
H100 = HARDWARE["h100-80gb"]
LLAMA = preset_shape("llama-3-8b")
LAYER_70B = 2 * (8192 * (2 * 8192 + 2 * 1024) + 3 * 8192 * 28672 + 2 * 8192)
MATRIX_70B = 2 * 128256 * 8192


def situation(
    model: str = "llama-3-8b",
    k_tokens: int = 400,
    memory_gib: int = 24,
    hardware: Hardware = H100,
    host_gib: int = 256,
) -> Situation:
    return Situation(
        shape=preset_shape(model),
        hardware=hardware,
        context_tokens=k_tokens * K,
        device_memory_bytes=memory_gib * GIB,
        host_memory_bytes=host_gib * GIB,
    )


def ours(here: Situation, gpus: int) -> dict[Split, SplitPlan]:
    plans = split_plans(here, [here.device_memory_bytes] * gpus)
    return {plan.split: plan for plan in plans if plan.method == "resident"}


def half(shape: ModelShape) -> ModelShape:
    layers = shape.layers[: len(shape.layers) // 2]
    return replace(shape, layers=layers, weights_bytes=shape.weights_bytes // 2)


def test_a_pipeline_fills_once_and_then_the_slowest_gpu_sets_the_pace() -> None:
    three = pipeline([[2, 1]] * 3)
    assert (three.seconds, three.busy) == (2 + 2 + 2 + 1, (6 / 7, 3 / 7))
    assert pipeline([[1, 3], [1, 3]]).seconds == 1 + 3 + 3
    assert pipeline([[1, 1, 1, 1]]).seconds == 4
    one_by_one = pipeline([[2, 1]] * 3, follow=False)
    assert (one_by_one.seconds, one_by_one.busy) == (9, (6 / 9, 3 / 9))


@pytest.mark.parametrize(
    ("model", "memory_gib", "gpus", "host_gib"),
    [
        ("llama-3-8b", 14, 1, 512),
        ("llama-3-8b", 8, 1, 4),
        ("llama-3-70b", 24, 1, 512),
        ("llama-3-70b", 24, 1, 30),
        ("llama-3-70b", 24, 3, 512),
        ("llama-3-70b", 24, 3, 40),
        ("llama-3-70b", 16, 8, 512),
    ],
)
def test_layers_lie_where_transformers_puts_them(
    model: str, memory_gib: int, gpus: int, host_gib: int
) -> None:
    config = transformers.AutoConfig.for_model(**PRESETS[model])
    with torch.device("meta"):
        stock = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    stock.tie_weights()
    whole = stock._no_split_modules
    given = memory_gib * GIB
    most = {gpu: weights_room_bytes(given) for gpu in range(gpus)} | {"cpu": host_gib * GIB}
    balanced = get_balanced_memory(stock, most, no_split_module_classes=whole)
    found = infer_auto_device_map(stock, balanced, no_split_module_classes=whole)
    layers = preset_shape(model).layers
    names = (f"model.layers.{layer}" for layer in range(len(layers)))
    # What lies in CPU memory or on the disk computes on the first GPU.
    wanted = Counter(0 if found[name] in ("cpu", "disk") else found[name] for name in names)
    spread = by_layers(preset_shape(model), [given] * gpus, host_bytes=host_gib * GIB)
    assert [len(share.shape.layers) for share in spread.shares] == list(wanted.values())
    for place, taken in (("cpu", spread.host_bytes), ("disk", spread.disk_bytes)):
        modules = [stock.get_submodule(name) for name, where in found.items() if where == place]
        stored = sum(weight.nbytes for module in modules for weight in module.parameters())
        assert taken == pytest.approx(stored, rel=1e-5)


@pytest.mark.parametrize(
    ("model", "gpus"),
    [
        ("llama-3-8b", [24] * 4),
        ("llama-3-8b", [24, 5, 9]),
        ("llama-3-70b", [24] * 8),
        ("llama-3-70b", [80] * 2),
        ("llama-3.2-1b", [24] * 3),
        ("gemma-2-9b", [24] * 3),
    ],
)
def test_where_gpus_hold_all_weights_layers_lie_where_ours_are_loaded(
    model: str, gpus: list[int]
) -> None:
    config = transformers.AutoConfig.for_model(**PRESETS[model])
    given = [each * GIB for each in gpus]
    places = even_map(config, "bfloat16", None, list(map(weights_room_bytes, given)))
    assert places is not None
    loaded = Counter(gpu for name, gpu in places.items() if ".layers." in name)
    spread = by_layers(preset_shape(model), given)
    assert [len(share.shape.layers) for share in spread.shares] == list(loaded.values())
    assert spread.host_bytes == 0


def test_what_one_card_does_not_hold_of_a_70b() -> None:
    """10 of 80 layers fit beside the embedding, with room for the output matrix."""
    (share,) = by_layers(preset_shape("llama-3-70b"), [24 * GIB]).shares
    assert share.shape.brought_bytes == pytest.approx(70 * LAYER_70B + MATRIX_70B, rel=1e-6)
    held = MATRIX_70B + 10 * LAYER_70B
    assert share.shape.weights_bytes == pytest.approx(held + MATRIX_70B, rel=1e-6)


def test_how_slowly_the_weights_of_a_70b_stream() -> None:
    """They cross the link for each token, and for each chunk, at half of its 25 GB/s."""
    here = situation("llama-3-70b", 32, 24, HARDWARE["rtx-4090"], 512)
    plan = ours(here, 1)[Split.NONE]
    assert plan.fits
    assert plan.weights_host_bytes == plan.brought_bytes
    once_s = (70 * LAYER_70B + MATRIX_70B) / 12.5e9
    (share,) = by_layers(here.shape, [24 * GIB]).shares
    at_home = replace(share.shape, brought_bytes=0)
    assert plan.chunk_tokens
    chunks = 32 * K // plan.chunk_tokens
    kept = Placement(chunk_tokens=plan.chunk_tokens)
    predictor = Predictor(at_home, here.hardware)
    assert plan.prefill_s > chunks * once_s + predictor.prefill_s(kept, 32 * K)
    assert plan.prefill_s < 1.25 * (chunks * once_s + predictor.prefill_s(kept, 32 * K))
    # A step also streams 10 GiB of KV less the residents.
    streamed_s = (plan.kv_host_bytes - plan.uses[0].resident_bytes) / 25e9
    assert plan.decode_s_per_token == pytest.approx(once_s + streamed_s, rel=0.02)
    assert any("113.52 GiB of weights stay in CPU memory" in line for line in why(here, 1))


def why(here: Situation, gpus: int) -> tuple[str, ...]:
    return choose_split(here, split_plans(here, [here.device_memory_bytes] * gpus)).why


def test_weights_that_cpu_memory_does_not_hold_beside_kv_are_read_from_a_disk() -> None:
    here = situation("llama-3-70b", 32, 24, HARDWARE["rtx-4090"], 64)
    plan = ours(here, 1)[Split.NONE]
    assert plan.fits
    # 64 GiB less 1 in reserve, 1 for the process and about 2% of page tables, less 10 of KV.
    room = (64 - 1 - 1) * GIB * 4096 / (4096 + 88)
    layers = (room - 10 * GIB - MATRIX_70B) // LAYER_70B  # it keeps room for the output matrix
    assert plan.weights_host_bytes == pytest.approx(layers * LAYER_70B, rel=1e-6)
    assert plan.disk_bytes == pytest.approx((70 - layers) * LAYER_70B + MATRIX_70B, rel=1e-6)
    assert plan.max_context_tokens == pytest.approx(room / (320 * K), rel=1e-3)
    # All of it crosses the link, too.
    once_s = (70 * LAYER_70B + MATRIX_70B) / 12.5e9 + plan.disk_bytes / 1e9
    roomy = ours(replace(here, host_memory_bytes=512 * GIB), 1)[Split.NONE]
    more_s = plan.decode_s_per_token - roomy.decode_s_per_token
    assert more_s == pytest.approx(plan.disk_bytes / 1e9, rel=1e-6)
    assert plan.decode_s_per_token > once_s
    choice = choose_split(here, split_plans(here, [24 * GIB]))
    assert choice.command == "headinfer generate --gpus 1 --host-memory 10.0GiB ..."
    assert "GiB on the disk. They cross the link for each token" in " ".join(choice.why)
    assert not ours(replace(here, host_memory_bytes=11 * GIB), 1)[Split.NONE].fits


def test_by_layers_one_link_after_the_other_brings_kv_in_a_decode_step() -> None:
    part = half(LLAMA), Placement(tile_heads=8, tile_tokens=128 * K)
    tokens = 2**20
    times = layers_times(H100, [part, part], tokens)
    assert times.decode_s == pytest.approx(2 * 64 * GIB / 50e9, rel=0.01)
    whole = Predictor(LLAMA, H100).decode_s(part[1], tokens)
    assert times.decode_s == pytest.approx(whole, rel=0.01)


def test_by_heads_both_links_bring_kv_at_once() -> None:
    rank = by_heads(LLAMA, [24 * GIB] * 2).shares[0].shape
    assert (rank.kv_heads, rank.query_heads, rank.mlp_width) == (4, 16, 7168)
    placement = Placement(tile_heads=4, tile_tokens=128 * K)
    times = heads_times(H100, (rank, placement), 2, 2**20)
    assert times.decode_s == pytest.approx(64 * GIB / 50e9, rel=0.02)
    # 2 all-reduces in each of 32 layers: 8 KiB once to the other, at 80% of 450 GB/s.
    assert times.reduce_s == pytest.approx(64 * (20e-6 + 8192 / 360e9))


def test_two_links_of_a_slow_host_share_what_its_memory_gives() -> None:
    slow = replace(H100, host_bytes_per_s=60e9)
    assert H100.with_busy_links(2).link_bytes_per_s == 50e9  # measured: 55 alone, 109 by two
    assert slow.with_busy_links(1).link_bytes_per_s == 50e9
    assert slow.with_busy_links(2).link_bytes_per_s == 30e9
    rank = by_heads(LLAMA, [24 * GIB] * 2).shares[0].shape
    placement = Placement(tile_heads=4, tile_tokens=128 * K)
    at_once = heads_times(slow, (rank, placement), 2, 2**20)
    assert at_once.decode_s == pytest.approx(64 * GIB / 30e9, rel=0.02)
    part = half(LLAMA), Placement(tile_heads=8, tile_tokens=128 * K)
    in_turn = layers_times(slow, [part, part], 2**20)
    assert in_turn.decode_s == pytest.approx(2 * 64 * GIB / 50e9, rel=0.01)


def test_chunks_follow_each_other_and_the_hidden_states_are_handed_on() -> None:
    part = half(LLAMA), Placement(chunk_tokens=K)
    one = Predictor(half(LLAMA), H100)
    times = layers_times(H100, [part, part], 8 * K)
    chunks = [one.chunk(part[1], past * K, K).seconds(overlap=True) for past in range(8)]
    handed = K * 4096 * 2 / 360e9
    # Chunks become slower, so that the second GPU waits for each, and is one chunk behind.
    assert times.prefill_s == pytest.approx(sum(chunks) + 8 * handed + chunks[-1])
    assert times.busy[1] == pytest.approx(sum(chunks) / times.prefill_s)
    whole = layers_times(H100, [(half(LLAMA), Placement())] * 2, 8 * K)
    assert whole.busy == pytest.approx((0.5, 0.5), abs=0.02)


@pytest.mark.parametrize(
    ("model", "memory_gib", "k_tokens", "measured_ms"),
    [
        ("llama-3-8b", 24, 400, {Split.NONE: 869, Split.LAYERS: 432, Split.HEADS: 231}),
        ("llama-3-70b", 78.5, 100, {Split.LAYERS: 251, Split.HEADS: 152}),
    ],
)
def test_decode_steps_take_about_what_they_took_on_two_h100s(
    model: str,
    memory_gib: float,
    k_tokens: int,
    measured_ms: dict[Split, float],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The figures of `benchmarks/results/gpu2-8b.json` and `gpu2-70b.json`, and their rates.

    They are older than answers that have plans of their own.
    """
    monkeypatch.setattr(Situation, "in_answer", lambda _, plan: plan)
    machine = replace(H100, link_bytes_per_s=55e9, device_bytes_per_s=2850e9, copy_start_s=4e-6)
    here = replace(
        situation(model, k_tokens, hardware=machine), device_memory_bytes=int(memory_gib * GIB)
    )
    plans = ours(here, 2)
    for split, milliseconds in measured_ms.items():
        predicted_s = plans[split].decode_s_per_token
        # Heads of the 70B had 0.7 GiB less of residents than is planned.
        assert predicted_s == pytest.approx(milliseconds / 1e3, rel=0.12), split


def test_launching_layers_bounds_steps_whose_weights_are_brought() -> None:
    brought = replace(LLAMA, brought_bytes=1)
    launched = layers_times(H100, [(brought, Placement())], K).decode_s
    assert launched == pytest.approx(32 * 1.8e-3)
    assert layers_times(H100, [(LLAMA, Placement())], K).decode_s < 0.01  # it is captured


@pytest.mark.parametrize("gpus", [1, 2, 4, 8])
def test_shares_add_up_to_the_model(gpus: int) -> None:
    for model in ("llama-3-8b", "llama-3.2-1b", "gemma-2-9b"):
        shape = preset_shape(model)
        spread = by_layers(shape, [80 * GIB] * gpus)
        shapes = [share.shape for share in spread.shares]
        assert sum((each.layers for each in shapes), ()) == shape.layers
        weights = sum(each.weights_bytes for each in shapes)
        assert weights == pytest.approx(shape.weights_bytes, abs=len(shape.layers))
        assert sum(each.kv_bytes(K) for each in shapes) == shape.kv_bytes(K)
        ranks = [share.shape for share in by_heads(shape, [80 * GIB] * gpus).shares]
        assert sum(each.kv_bytes(K) for each in ranks) == shape.kv_bytes(K)
        more = (gpus - 1) * shape.embedding_bytes  # which each rank has
        assert sum(each.weights_bytes for each in ranks) == pytest.approx(
            shape.weights_bytes + more, abs=gpus
        )


@pytest.mark.slow
def test_the_longest_context_fits_and_one_token_more_does_not() -> None:
    here = situation(host_gib=100)
    for split in (Split.LAYERS, Split.HEADS):
        longest = ours(here, 2)[split].max_context_tokens
        assert longest
        assert ours(replace(here, context_tokens=longest), 2)[split].fits
        assert not ours(replace(here, context_tokens=longest + 1), 2)[split].fits


def test_at_400k_heads_are_split_and_a_model_of_odd_heads_is_split_by_layers() -> None:
    plans = ours(situation(), 2)
    # What the issue asks of two GPUs beside one.
    assert plans[Split.HEADS].decode_s_per_token < 0.45 * plans[Split.NONE].decode_s_per_token
    assert plans[Split.LAYERS].prefill_s < 0.6 * plans[Split.NONE].prefill_s
    choice = choose_split(situation(), split_plans(situation(), [24 * GIB] * 2))
    assert choice.plan is not None
    assert choice.plan.split is Split.HEADS
    assert "--tensor-parallel" in choice.command
    odd = situation("phi-4", memory_gib=32)
    choice = choose_split(odd, split_plans(odd, [32 * GIB] * 2))
    assert choice.plan is not None
    assert choice.plan.split is Split.LAYERS
    assert choice.command == "headinfer generate --gpus 2 ..."


@pytest.mark.parametrize(
    ("model", "gpus", "reason"),
    [
        ("llama-3-8b", 3, "3 ranks cannot share 8 KV heads evenly"),
        ("phi-4", 2, "does not split the heads of this model"),
        ("gpt-oss-20b", 2, "does not split the heads of this model"),
    ],
)
def test_heads_that_cannot_be_split_are_told(model: str, gpus: int, reason: str) -> None:
    here = situation(model, 100, 80)
    plan = ours(here, gpus)[Split.HEADS]
    assert plan.obstacle is not None
    assert reason in plan.obstacle
    assert not plan.fits
    assert any(reason in line for line in why(here, gpus))


def test_four_gpus_have_eight_of_32_layers_each_and_work_alike() -> None:
    """transformers would give them 7, 12, 12 and 1: its second GPU bounds a prefill."""
    plan = ours(situation(), 4)[Split.LAYERS]
    assert [use.layers for use in plan.uses] == [8] * 4
    busy = [use.busy for use in plan.uses]
    assert min(busy) > 0.9 * max(busy)


def test_each_gpu_may_give_another_amount() -> None:
    plans = split_plans(situation(), [24 * GIB, 12 * GIB])
    layers = next(plan for plan in plans if plan.split is Split.LAYERS)
    assert [use.layers for use in layers.uses] == [16, 16]
    resident = next(
        plan for plan in plans if plan.split is Split.LAYERS and plan.method == "resident"
    )
    assert [
        use.total_bytes <= given * GIB for use, given in zip(resident.uses, (24, 12), strict=True)
    ] == [True, True]
    assert resident.uses[0].resident_bytes > 2 * resident.uses[1].resident_bytes


@pytest.mark.slow
def test_ranks_wait_for_the_one_with_the_least_memory() -> None:
    took = []
    for given in ((24, 16), (16, 24), (16, 16)):
        plans = split_plans(situation(), [each * GIB for each in given])
        took += [
            plan.decode_s_per_token
            for plan in plans
            if plan.split is Split.HEADS and plan.method == "resident"
        ]
    assert took == [took[-1]] * 3


def test_more_gpus_than_layers_are_refused() -> None:
    with pytest.raises(OptionError, match="there are 33 GPUs, and llama-3-8b has 32 layers"):
        split_plans(situation(), [24 * GIB] * 33)
