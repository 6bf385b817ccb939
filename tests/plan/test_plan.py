"""Plans: what fits is chosen, what does not is refused, and the bytes add up."""

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headinfer.errors import MemoryPlanError, OptionError
from headinfer.estimate.machines import HARDWARE
from headinfer.plan.hardware import Hardware
from headinfer.plan.memory import ALIGNMENT_BYTES, runtime_bytes
from headinfer.plan.options import Options
from headinfer.plan.predict import Predictor
from headinfer.plan.resolve import resolve
from headinfer.plan.shape import LayerKind, LayerShape, ModelShape
from shapes import LLAMA_3_8B, model_shape

GIB = 2**30


def test_llama_3_8b_on_24_gib() -> None:
    plan = resolve(LLAMA_3_8B, Options.parse(device_memory="24GiB"), device="cuda")
    assert plan.total_device_bytes <= 24 * GIB
    assert plan.kv_host_bytes(2**20) == 128 * GIB  # the paper's Table 10
    # 8192-token chunk pages of one layer (2 x 32 MiB), 2 x 64-token tails of 32 layers
    # (2 x 8 MiB), and 3 staging tiles of 64 MiB.
    assert plan.chunk_page_bytes == 2 * 8192 * 4096
    assert plan.tail_bytes == 2 * 64 * 128 * 1024
    assert plan.staging_bytes == 3 * 64 * 2**20
    assert plan.arena_bytes == 272 * 2**20 + ALIGNMENT_BYTES


def test_the_devices_share_does_not_depend_on_the_context() -> None:
    options = Options.parse(device_memory="24GiB")
    plans = [
        resolve(LLAMA_3_8B, options, device="cuda", context_tokens=tokens)
        for tokens in (2**17, 2**20, 2**24)
    ]
    assert len({plan.total_device_bytes for plan in plans}) == 1


@pytest.mark.parametrize("heads", [8, 4, 2, 1])
def test_the_papers_head_settings(heads: int) -> None:
    """head=8/4/2/1 with whole contexts: two heads' KV in the paper, here one tile more."""
    options = Options.parse(tile_heads=heads, tile_tokens="all")
    plan = resolve(LLAMA_3_8B, options, device="cuda", context_tokens=2**20)
    assert plan.staging_bytes == 3 * heads * 2**20 * 2 * 128 * 2


def test_smaller_budgets_get_smaller_tiles_and_chunks() -> None:
    sizes = []
    for budget in ("24GiB", "17.5GiB", "16.9GiB", "16.4GiB"):
        plan = resolve(LLAMA_3_8B, Options.parse(device_memory=budget), device="cuda")
        assert plan.total_device_bytes <= plan.device_memory_bytes
        sizes.append((plan.chunk_tokens, plan.tile_heads * plan.tile_tokens))
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] != sizes[-1]


def test_cuda_itself_is_counted_and_told() -> None:
    options = Options.parse(device_memory="24GiB", resident_tokens="all")
    plans = {
        device: resolve(LLAMA_3_8B, options, device=device, context_tokens=100 * 1024)
        for device in ("cuda", "simulated", "cpu")
    }
    assert {name: plan.runtime_bytes for name, plan in plans.items()} == {
        "cuda": 5 * GIB // 4,
        "simulated": 0,
        "cpu": 0,
    }
    for plan in plans.values():
        torchs = plan.shape.weights_bytes + plan.kv_device_bytes + plan.activation_bytes
        assert plan.total_device_bytes == torchs + plan.runtime_bytes <= 24 * GIB
        assert ("CUDA itself 1.25 GiB" in str(plan)) == (plan.device == "cuda")


def test_large_chunks_leave_room_for_what_torchs_allocator_cannot_use() -> None:
    """An MLP's tensor of a chunk of 16K takes 448 MiB, and the allocator holds more than one."""
    activations = {
        chunk: resolve(
            LLAMA_3_8B,
            Options.parse(device_memory="24GiB", chunk_tokens=chunk, resident_tokens="all"),
            device="cuda",
            context_tokens=100 * 1024,
        ).activation_bytes
        for chunk in ("4K", "16K")
    }
    tensor, cudas_own = 16 * 1024 * 14336 * 2, 384 * 2**20
    more = activations["16K"] - 4 * activations["4K"]
    assert 3 * tensor // 2 < more + cudas_own < 2 * tensor


def test_a_cpu_plan_copies_nothing() -> None:
    plan = resolve(LLAMA_3_8B, Options(), device="cpu")
    assert plan.arena_bytes == 0
    assert plan.tile_heads == 8
    assert "tiles" not in str(plan)
    assert "prompts pass in chunks of" in str(plan)


def test_sliding_windows_are_counted_on_the_device() -> None:
    window = LayerShape(
        kind=LayerKind.SLIDING, kv_heads=2, key_dim=8, value_dim=8, window_tokens=100
    )
    full = LayerShape(kind=LayerKind.FULL, kv_heads=2, key_dim=8, value_dim=8)
    shape = ModelShape(
        name="Hybrid",
        layers=(window, full, LayerShape(kind=LayerKind.STATE)),
        query_heads=4,
        hidden_size=32,
        mlp_width=64,
        vocab_size=10,
        weights_bytes=10,
        kv_itemsize=2,
        max_positions=0,
    )
    assert shape.kv_bytes(50) == 50 * 2 * 16 * 2
    assert shape.window_bytes(20) == 2 * (99 + 20) * 2 * 16 * 2
    assert shape.standard_kv_bytes(50) == 2 * 50 * 2 * 16 * 2
    assert shape.standard_kv_bytes(1000) == (1000 + 99) * 2 * 16 * 2


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (
            {"device_memory": "10GiB"},
            r"10\.00 GiB is below the weights .* 14\.96 GiB; give at .* CUDA itself 1\.25 GiB$",
        ),
        (
            {"device_memory": "15.9GiB"},
            r"is too small: the smallest settings .* CUDA itself 1\.25 GiB$",
        ),
        (
            {"device_memory": "20GiB", "tile_tokens": "4M", "tile_heads": 8},
            "does not hold the settings given",
        ),
        (
            {"device_memory": "20GiB", "chunk_tokens": "1M"},
            r"chunk_tokens=128.* CUDA itself 1\.25 GiB$",
        ),
    ],
)
def test_what_does_not_fit_is_refused_with_what_would(
    options: dict[str, str | int], reason: str
) -> None:
    with pytest.raises(MemoryPlanError, match=reason):
        resolve(LLAMA_3_8B, Options.parse(**options), device="cuda")


def test_whole_contexts_need_a_known_context() -> None:
    options = Options.parse(tile_tokens="all")
    with pytest.raises(OptionError, match="needs a known context"):
        resolve(model_shape(max_positions=0), options, device="cuda")


@settings(deadline=None)
@given(
    shape=st.builds(
        model_shape,
        layers=st.integers(1, 4),
        kv_heads=st.integers(1, 9),
        group=st.integers(1, 5),
        key_dim=st.integers(1, 70),
        value_dim=st.integers(1, 70),
        itemsize=st.sampled_from([2, 4]),
        weights_bytes=st.integers(1, 10**6),
    ),
    budget=st.integers(1, 10**8).map(lambda spare: runtime_bytes("cuda") + spare),
    chunk=st.sampled_from(["auto", 1, 100, 4096]),
    heads=st.sampled_from(["auto", "all", 1]),
    tokens=st.sampled_from(["auto", 1, 300, "64K"]),
    batch=st.integers(1, 4),
    context=st.sampled_from([None, 1, 1000, 10**6]),
)
def test_a_plan_never_exceeds_its_budget(
    shape: ModelShape,
    budget: int,
    chunk: str | int,
    heads: str | int,
    tokens: str | int,
    batch: int,
    context: int | None,
) -> None:
    options = Options.parse(
        device_memory=budget, chunk_tokens=chunk, tile_heads=heads, tile_tokens=tokens
    )
    try:
        plan = resolve(shape, options, device="cuda", batch=batch, context_tokens=context)
    except MemoryPlanError:
        return
    assert plan.total_device_bytes <= budget
    assert 1 <= plan.tile_heads <= shape.kv_heads
    assert plan.page_tokens <= max(plan.chunk_tokens // 2, 1)
    pieces = plan.staging_bytes + plan.tail_bytes + plan.chunk_page_bytes + plan.resident_bytes
    assert plan.arena_bytes == pieces + ALIGNMENT_BYTES
    streams = plan.streamed_bytes(context or 0) > 0  # then the CPU waits to be measured
    optional = (context is not None, plan.resident_tokens > 0, streams)
    assert len(str(plan).splitlines()) == 2 + sum(optional)


@pytest.mark.parametrize(
    ("options", "hardware", "context", "told"),
    [
        ({}, None, 100_000, True),
        ({}, None, 1000, False),  # all of it is resident
        ({"host_attention": "off"}, None, 100_000, False),
        ({}, HARDWARE["rtx-4090"], 100_000, False),  # planned for another machine
    ],
)
def test_a_plan_tells_that_the_cpu_waits_for_a_measurement(
    options: dict[str, str], hardware: Hardware | None, context: int, told: bool
) -> None:
    plan = resolve(
        LLAMA_3_8B,
        Options.parse(device_memory="24GiB", **options),
        device="cuda",
        context_tokens=context,
        hardware=hardware,
    )
    assert ("`headinfer probe`" in str(plan)) == told


@pytest.mark.covering
@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("context", [100, 5000, 2**17, 2**20])
@pytest.mark.parametrize("memory", ["19GiB", "24GiB", "60GiB"])
def test_no_plan_that_is_not_looked_at_is_faster(
    monkeypatch: pytest.MonkeyPatch, memory: str, context: int, overlap: bool
) -> None:
    hardware = dataclasses.replace(HARDWARE["h100-80gb"], host_bytes_per_s=140e9)
    options = Options.parse(device_memory=memory, overlap=overlap)
    known = {"device": "cuda", "context_tokens": context, "hardware": hardware}
    ours = resolve(LLAMA_3_8B, options, **known)
    monkeypatch.setattr(Predictor, "least_answer_s", lambda *_: 0.0)
    assert ours == resolve(LLAMA_3_8B, options, **known)
