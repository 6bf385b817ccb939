"""Predicted times, and plans chosen by them."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headinfer.errors import MemoryPlanError
from headinfer.estimate.machines import HARDWARE
from headinfer.estimate.presets import preset_shape
from headinfer.plan.choices import MAX_TILE_TOKENS
from headinfer.plan.format import Format
from headinfer.plan.hardware import Hardware
from headinfer.plan.memory import ALIGNMENT_BYTES, runtime_bytes
from headinfer.plan.options import Options
from headinfer.plan.plan import Plan
from headinfer.plan.predict import Predictor, active_parameters
from headinfer.plan.resolve import resolve
from headinfer.plan.shape import ModelShape
from headinfer.plan.step_time import Placement
from shapes import LLAMA_3_8B, model_shape

RTX_4090 = HARDWARE["rtx-4090"]


def test_parameters_are_those_of_the_layers() -> None:
    embeddings, norms = 2 * 128256 * 4096, (2 * 32 + 1) * 4096
    assert active_parameters(LLAMA_3_8B) == 8_030_261_248 - embeddings - norms


def test_a_streamed_decode_step_takes_the_links_time() -> None:
    placement = Placement(chunk_tokens=8192, tile_heads=8, tile_tokens=16384)
    predictor = Predictor(LLAMA_3_8B, RTX_4090)
    tiles, layers, copies = 32 * 64, 32, 32 * 64 * 2
    start_s = layers * 0.75e-3 + (tiles + layers) * 100e-6 + copies * RTX_4090.copy_start_s
    streamed_s = 128 * 2**30 / 25e9
    assert predictor.decode_s(placement, 2**20) == pytest.approx(streamed_s + 0.1 * start_s)
    half = replace(placement, resident_bytes=64 * 2**30)
    tiles, copies = tiles / 2, copies / 2
    start_s = layers * 0.75e-3 + (tiles + 2 * layers) * 100e-6 + copies * RTX_4090.copy_start_s
    assert predictor.decode_s(half, 2**20) == pytest.approx(streamed_s / 2 + 0.1 * start_s)
    assert predictor.decode(half, 2**20).limited_by == "the link"


def test_a_step_of_many_small_tiles_takes_what_starting_them_does() -> None:
    placement = Placement(chunk_tokens=8192, tile_heads=1, tile_tokens=1024)
    tiles = 32 * 8
    start_s = 32 * 0.75e-3 + (tiles + tiles) * 100e-6 + 2 * tiles * RTX_4090.copy_start_s
    parts = Predictor(LLAMA_3_8B, RTX_4090).decode(placement, 1024)
    assert parts.seconds(overlap=True) == pytest.approx(1.1 * start_s)
    assert parts.limited_by == "starting tiles"


@pytest.mark.parametrize(
    ("tile_heads", "tile_tokens", "measured_s"),
    [(8, 16384, 0.265), (8, 102408, 0.266), (1, 102408, 0.252)],
)
def test_a_streamed_decode_step_takes_about_what_it_took_beside_an_h100(
    tile_heads: int, tile_tokens: int, measured_s: float
) -> None:
    """Llama-3-8B's shape with 100K tokens, over a link of 53.3 GB/s."""
    machine = replace(HARDWARE["h100-80gb"], link_bytes_per_s=53.3e9, copy_start_s=27e-6)
    placement = Placement(tile_heads=tile_heads, tile_tokens=tile_tokens)
    predicted_s = Predictor(LLAMA_3_8B, machine).decode_s(placement, 100 * 1024)
    assert predicted_s == pytest.approx(measured_s, rel=0.1)


def test_memory_that_is_left_makes_tiles_that_are_few() -> None:
    options = Options.parse(device_memory="24GiB", resident_tokens=0, host_attention="off")
    known = {"device": "cuda", "hardware": HARDWARE["h100-80gb"]}
    plan = resolve(LLAMA_3_8B, options, context_tokens=100 * 1024, **known)
    assert (plan.tile_heads, plan.tile_tokens) == (8, 100 * 1024)
    parts = Predictor(LLAMA_3_8B, HARDWARE["h100-80gb"]).decode(plan.placement, 100 * 1024)
    assert parts.start_s < 0.2 * parts.link_s
    longer = [
        resolve(LLAMA_3_8B, options, context_tokens=tokens, **known) for tokens in (2**20, 2**24)
    ]
    assert {plan.tile_tokens for plan in longer} == {MAX_TILE_TOKENS}
    assert len({plan.total_device_bytes for plan in longer}) == 1
    no_limit = resolve(LLAMA_3_8B, Options(), context_tokens=2**20, **known)
    assert no_limit.staging_bytes == 3 * 64 * 2**20


def test_a_decode_step_on_the_device_reads_weights_and_kv() -> None:
    weights = (active_parameters(LLAMA_3_8B) + 128256 * 4096) * 2
    step = Predictor(LLAMA_3_8B, RTX_4090).decode(Placement(), 2**17)
    assert step.compute_s == pytest.approx(weights / 1e12 + 16 * 2**30 / 0.8e12)
    assert step.limited_by == "computing"


def test_prefill_does_the_same_attention_in_any_chunks() -> None:
    free_weights = replace(RTX_4090, device_bytes_per_s=1e30)
    predictor = Predictor(LLAMA_3_8B, free_weights)
    times = {predictor.prefill_s(Placement(chunk_tokens=size), 2**20) for size in (None, 512, 8192)}
    assert max(times) == pytest.approx(min(times))


def test_small_chunks_attend_at_the_rate_measured_for_them() -> None:
    rates = ((1024, 50e12), (8192, 100e12))
    measured = replace(RTX_4090, chunk_attention_flops_per_s=rates)

    def attention_s(hardware: Hardware, chunk_tokens: int) -> float:
        """The time that 1M past tokens add to a chunk, over its tokens: all else is the same."""
        placement, predictor = Placement(chunk_tokens=chunk_tokens), Predictor(LLAMA_3_8B, hardware)
        far, near = (
            predictor.chunk(placement, past, chunk_tokens).compute_s for past in (2**20, 0)
        )
        return (far - near) / chunk_tokens

    fast = attention_s(replace(RTX_4090, prefill_attention_flops_per_s=100e12), 8192)
    for chunk_tokens, factor in [(512, 2), (1024, 2), (4096, 2), (7000, 1), (8192, 1), (16384, 1)]:
        assert attention_s(measured, chunk_tokens) == pytest.approx(factor * fast), chunk_tokens


def test_small_tiles_count_as_small_chunks_unless_nothing_is_streamed() -> None:
    rates = ((1024, 50e12), (8192, 100e12))
    predictor = Predictor(LLAMA_3_8B, replace(RTX_4090, chunk_attention_flops_per_s=rates))
    large, small = (Placement(chunk_tokens=8192, tile_tokens=n) for n in (16384, 8192))
    held = replace(small, resident_bytes=2**50)
    past = 2**18
    large_s, small_s, held_s = (
        predictor.chunk(placement, past, 8192).compute_s for placement in (large, small, held)
    )
    assert small_s > 1.2 * large_s
    assert held_s == pytest.approx(large_s, rel=0.03)  # but for what is merged
    # Two rows of half a chunk see as much, and are small chunks all the same.
    two = replace(large, batch=2, chunk_tokens=4096)
    assert predictor.chunk(two, past + 2048, 4096).compute_s == pytest.approx(small_s, rel=0.01)


def test_idle_experts_are_not_read() -> None:
    shape = preset_shape("qwen3-30b-a3b")
    predictor = Predictor(shape, RTX_4090)
    assert predictor.weight_bytes_read(1) < shape.weights_bytes / 5
    assert predictor.weight_bytes_read(1000) == shape.weights_bytes


def test_without_overlap_the_parts_add_up() -> None:
    predictor = Predictor(LLAMA_3_8B, RTX_4090)
    placement = Placement(tile_heads=8, tile_tokens=16384, overlap=False)
    parts = predictor.decode(placement, 2**20)
    total = parts.compute_s + parts.link_s + parts.link_back_s + parts.start_s
    assert parts.start_s > 0
    assert predictor.decode_s(placement, 2**20) == total


def test_a_window_bounds_the_attention_of_its_layer() -> None:
    shape = preset_shape("gemma-2-9b")
    full = replace(shape, layers=tuple(layer for layer in shape.layers if not layer.window_tokens))
    windowed = replace(shape, layers=tuple(layer for layer in shape.layers if layer.window_tokens))
    times = [
        Predictor(part, RTX_4090).chunk(Placement(), 2**20, 1024).compute_s
        for part in (full, windowed)
    ]
    assert times[0] > 10 * times[1]


SHAPES = st.one_of(
    st.sampled_from([LLAMA_3_8B, preset_shape("gemma-3-27b"), preset_shape("gpt-oss-20b")]),
    st.builds(
        model_shape,
        layers=st.integers(1, 4),
        kv_heads=st.integers(1, 9),
        group=st.integers(1, 5),
        key_dim=st.integers(1, 70),
        value_dim=st.integers(1, 70),
        itemsize=st.sampled_from([2, 4]),
        weights_bytes=st.integers(1, 10**6),
    ),
)
MACHINES = st.builds(
    lambda hardware, link: replace(
        hardware, link_bytes_per_s=link, link_back_bytes_per_s=link, name="any"
    ),
    st.sampled_from(list(HARDWARE.values())),
    st.floats(1e9, 1e12),
)
FIXED = [
    {"chunk_tokens": chunk, "tile_heads": heads, "tile_tokens": tokens}
    for chunk in (128, 1024, 8192)
    for heads in (1, 2, 4, 8, "all")
    for tokens in (256, 4096, "64K", "all")
]


@settings(deadline=None, max_examples=40)
@given(
    shape=SHAPES,
    hardware=MACHINES,
    # Below 256 tokens a tile of all of them is smaller than any that is chosen.
    tokens=st.integers(8, 22).map(lambda power: 2**power) | st.integers(256, 2**22),
    spare=st.integers(2**16, 2**35),
    batch=st.sampled_from([1, 3, 64]),
    keep_resident=st.booleans(),
)
def test_no_fixed_setting_is_predicted_to_be_faster(
    shape: ModelShape,
    hardware: Hardware,
    tokens: int,
    spare: int,
    batch: int,
    keep_resident: bool,
) -> None:
    budget = shape.weights_bytes + runtime_bytes("cuda") + spare

    def plan(**values: object) -> Plan | None:
        resident = "auto" if keep_resident else 0
        values = {"device_memory": budget, "resident_tokens": resident, **values}
        heads = values.get("tile_heads")
        if isinstance(heads, int) and heads > shape.kv_heads:
            return None
        try:
            return resolve(
                shape,
                Options.parse(**values),
                device="cuda",
                batch=batch,
                context_tokens=tokens,
                hardware=hardware,
            )
        except MemoryPlanError:
            return None

    predictor = Predictor(shape, hardware)
    chosen = plan()
    fixed = [other for values in FIXED if (other := plan(**values)) is not None]
    # Longer tiles are never chosen, so that staging is bounded; they may gain a little.
    fixed = [other for other in fixed if other.tile_tokens <= MAX_TILE_TOKENS]
    if chosen is None:
        assert not fixed
        return
    assert chosen.total_device_bytes <= budget
    pieces = chosen.staging_bytes + chosen.tail_bytes + chosen.chunk_page_bytes
    assert chosen.arena_bytes == pieces + chosen.resident_bytes + ALIGNMENT_BYTES
    assert chosen.resident_bytes % ALIGNMENT_BYTES == 0
    assert keep_resident or chosen.resident_bytes == 0
    time, prefill = (
        predict(chosen.placement, tokens) for predict in (predictor.answer_s, predictor.prefill_s)
    )
    for other in fixed:
        other_s = predictor.prefill_s(other.placement, tokens)
        assert prefill <= 1.03 * other_s, other
        if other_s <= prefill:
            assert time <= predictor.answer_s(other.placement, tokens) * (1 + 1e-9), other


@pytest.mark.parametrize("tokens", [10, 40, 100, 400])
def test_a_prompt_is_as_fast_as_in_fixed_chunks_and_with_nothing_resident(tokens: int) -> None:
    hardware = replace(
        HARDWARE["h100-80gb"],
        chunk_attention_flops_per_s=((2048, 340e12), (4096, 665e12), (8192, 672e12)),
    )
    known = {"device": "cuda", "context_tokens": tokens * 1024 + 1, "hardware": hardware}
    predictor = Predictor(LLAMA_3_8B, hardware)

    def prefill_s(**values: object) -> float:
        plan = resolve(LLAMA_3_8B, Options.parse(device_memory="24GiB", **values), **known)
        return predictor.prefill_s(plan.placement, tokens * 1024)

    auto_s = prefill_s()
    for values in ({"resident_tokens": 0}, {"chunk_tokens": "4K"}, {"chunk_tokens": "8K"}):
        assert auto_s <= 1.03 * prefill_s(**values), values


@pytest.mark.parametrize("tokens", [9 * 1024, 15 * 1024])
def test_a_short_prompt_that_fits_passes_at_once(tokens: int) -> None:
    options, known = Options.parse(device_memory="24GiB"), {"device": "cuda"}
    for hardware in (None, RTX_4090):
        plan = resolve(LLAMA_3_8B, options, context_tokens=tokens, hardware=hardware, **known)
        assert plan.chunk_tokens >= tokens
        assert plan.resident_tokens == tokens


def test_chunks_as_measured_on_an_h100_are_ranked_so() -> None:
    """Of `gpu-suite-llama-prefill.json`, 100K tokens: 9.38 s in chunks of 4K, 8.58 in 8K."""
    predictor = Predictor(LLAMA_3_8B, HARDWARE["h100-80gb"])
    tiles = {"tile_heads": 8, "tile_tokens": 16384}
    small = Placement(chunk_tokens=4096, resident_bytes=58187 * 2**17, **tiles)
    large = Placement(chunk_tokens=8192, **(tiles | {"tile_tokens": 102401}))
    small_s, large_s = (predictor.prefill_s(each, 102400) for each in (small, large))
    assert 1.02 < small_s / large_s < 1.15


def test_without_rates_usual_tiles_are_taken() -> None:
    options = Options.parse(device_memory="24GiB", resident_tokens=0)
    plain = resolve(LLAMA_3_8B, options, device="cuda", context_tokens=2**20)
    by_time = resolve(LLAMA_3_8B, options, device="cuda", context_tokens=2**20, hardware=RTX_4090)
    assert (plain.tile_heads, plain.tile_tokens) == (8, 2**14)
    assert (by_time.tile_heads, by_time.tile_tokens) == (8, 2**17)
    assert by_time.chunk_tokens == plain.chunk_tokens


def test_memory_for_tiles_is_given_up_where_all_kv_then_fits() -> None:
    tokens = 2**15
    options = Options.parse(device_memory="24GiB")
    known = {"device": "cuda", "context_tokens": tokens, "hardware": RTX_4090}
    roomy = resolve(LLAMA_3_8B, options, **known)
    assert roomy.resident_tokens == tokens
    assert roomy.resident_bytes == 4 * 2**30
    smallest = 3 * 256 * 8 * 2 * 128 * 2  # three tiles of 256 tokens
    spared = roomy.staging_bytes - smallest
    assert spared > 2**20
    tight = Options.parse(device_memory=roomy.total_device_bytes - spared)
    plan = resolve(LLAMA_3_8B, tight, **known)
    assert plan.resident_tokens == tokens
    assert plan.chunk_tokens == roomy.chunk_tokens


@pytest.mark.parametrize("resident", [0, 1000, "64K", "all"])
def test_resident_tokens_may_be_set(resident: int | str) -> None:
    options = Options.parse(device_memory="24GiB", resident_tokens=resident)
    plan = resolve(LLAMA_3_8B, options, device="cuda", context_tokens=2**15)
    wanted = {0: 0, 1000: 1000, "64K": 2**16, "all": 2**15}[resident]
    assert plan.resident_tokens == min(wanted, plan.resident_tokens)
    assert plan.total_device_bytes <= 24 * 2**30
    if wanted <= 2**15:
        assert plan.resident_tokens == wanted


def test_the_host_takes_the_share_that_finishes_with_the_link() -> None:
    measured = replace(RTX_4090, measured=True, host_bytes_per_s=140e9)
    options = Options.parse(device_memory="24GiB")
    known = {"device": "cuda", "context_tokens": 2**20}
    plan = resolve(LLAMA_3_8B, options, **known, hardware=measured)
    assert plan.host_share == pytest.approx(70 / 95)
    parts = Predictor(LLAMA_3_8B, measured).decode(plan.placement, 2**20)
    assert parts.host_s == pytest.approx(parts.link_s, rel=1e-5)  # tokens are whole
    # What the link reads the CPU cannot read at the same time: both are slowed down alike.
    for slow in (
        replace(measured, host_bytes_per_s=40e9),
        replace(measured, host_shared_bytes_per_s=40e9),
    ):
        plan = resolve(LLAMA_3_8B, options, **known, hardware=slow)
        assert plan.host_share == pytest.approx(70 / 95)
        slowed = Predictor(LLAMA_3_8B, slow).decode(plan.placement, 2**20)
        assert slowed.host_s == pytest.approx(plan.streamed_bytes(2**20) / 40e9)
        assert slowed.host_s > parts.host_s
    assert resolve(LLAMA_3_8B, options, **known, hardware=RTX_4090).host_share == 0
    # A link that takes all the memory gives leaves nothing to share.
    taken = replace(measured, host_shared_bytes_per_s=24e9)
    assert resolve(LLAMA_3_8B, options, **known, hardware=taken).host_share == 0
    half = Options.parse(device_memory="24GiB", host_attention=0.5)
    assert resolve(LLAMA_3_8B, half, **known).host_share == 0.5


@pytest.mark.parametrize(
    ("form", "attended"), [(Format.PACKED, 0.87), (Format.INT8, 0.6), (Format.FP8, 0.49)]
)
def test_the_host_takes_less_of_forms_that_it_attends_more_slowly(
    form: Format, attended: float
) -> None:
    measured = replace(RTX_4090, measured=True)
    shape, options = LLAMA_3_8B.stored_as(form), Options.parse(device_memory="24GiB")
    plan = resolve(shape, options, device="cuda", context_tokens=2**20, hardware=measured)
    rate = 70e9 * attended
    assert plan.host_share == pytest.approx(rate / (rate + 25e9))
    step = Predictor(shape, measured).decode(plan.placement, 2**20)
    assert step.host_s == pytest.approx(plan.host_share * plan.streamed_bytes(2**20) / rate, 1e-4)


def test_the_host_takes_less_where_several_tokens_are_verified_at_once() -> None:
    measured = replace(RTX_4090, measured=True, host_verify_bytes_per_s=17.5e9)
    options = Options.parse(device_memory="24GiB")
    plan = resolve(LLAMA_3_8B, options, device="cuda", context_tokens=2**20, hardware=measured)
    assert plan.host_share_at(1) == plan.host_share == pytest.approx(70 / 95)
    assert plan.host_share_at(16) == pytest.approx(17.5 / 42.5)
    for tokens in (2, 5, 9, 16):
        reached = measured.host_attention_at(tokens)
        assert plan.host_share_at(tokens) == pytest.approx(reached / (reached + 25e9))
    predictor = Predictor(LLAMA_3_8B, measured)
    one = predictor.decode(plan.placement, 2**20)
    assert predictor.chunk(plan.placement, 2**20, 16).host_s == pytest.approx(4 * one.host_s, 1e-4)
    assert measured.shared_by(2).host_attention_at(16) == pytest.approx(17.5e9 / 2)
    # Unless it was measured, more tokens are taken to cost the host no more.
    rough = replace(measured, host_verify_bytes_per_s=None)
    assert rough.host_attention_at(16) == 70e9
    plan = resolve(LLAMA_3_8B, options, device="cuda", context_tokens=2**20, hardware=rough)
    assert plan.host_share_at(16) == plan.host_share


def test_a_link_as_fast_as_the_hosts_memory_leaves_the_host_some() -> None:
    slow = replace(RTX_4090, measured=True, host_bytes_per_s=20e9)
    plan = resolve(
        LLAMA_3_8B,
        Options.parse(device_memory="24GiB", host_attention=0.5),
        device="cuda",
        context_tokens=2**20,
        hardware=slow,
    )
    assert Predictor(LLAMA_3_8B, slow).decode(plan.placement, 2**20).limited_by == "the host"


def test_windows_alone_stream_nothing() -> None:
    mixed = model_shape(layers=32, window_tokens=64)
    shape = replace(mixed, layers=mixed.layers[::2])
    assert not shape.full_layers
    placement = Placement(tile_heads=1, tile_tokens=1024)
    parts = Predictor(shape, RTX_4090).decode(placement, 2**17)
    assert (parts.start_s, parts.link_s, parts.link_back_s) == (0.0, 0.0, 0.0)


def test_weights_that_are_brought_come_before_all_else() -> None:
    brought = replace(LLAMA_3_8B, brought_bytes=10 * 2**30)
    placement = Placement(chunk_tokens=8192, tile_heads=8, tile_tokens=16384)
    there, away = Predictor(LLAMA_3_8B, RTX_4090), Predictor(brought, RTX_4090)
    once_s = 10 * 2**30 / 12.5e9  # half of the link's rate
    for tokens in (2**15, 2**20):
        assert away.decode_s(placement, tokens) == pytest.approx(
            there.decode_s(placement, tokens) + once_s
        )
    assert away.prefill_s(placement, 2**16) == pytest.approx(
        there.prefill_s(placement, 2**16) + 8 * once_s
    )
    assert away.decode(placement, 1).limited_by == "bringing weights"


def test_where_weights_are_brought_chunks_are_large() -> None:
    """Eight times as many chunks would bring the weights eight times as often."""
    options = Options.parse(device_memory="24GiB", host_attention="off")
    known = {"device": "cuda", "hardware": RTX_4090, "context_tokens": 256 * 1024}
    there = resolve(LLAMA_3_8B, options, **known)
    away = resolve(replace(LLAMA_3_8B, brought_bytes=10 * 2**30), options, **known)
    assert there.chunk_tokens < away.chunk_tokens == 16384
