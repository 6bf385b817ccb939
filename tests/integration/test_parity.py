"""Exactness: every architecture against stock eager attention, on odd sizes."""

import functools

import pytest
import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.generation import GenerateDecoderOnlyOutput

import headinfer
from tiny_models import ARCHITECTURES, random_tokens, shared_model, tiny_model

PROMPT = 117
NEW = 12
TOLERANCE = 1e-5

# (tile_heads, tile_tokens, chunk_tokens): whole; many odd tiles and chunks; a chunk that divides
# the prompt and tiles that do not; a chunk larger than the prompt with small tiles.
TILINGS = [("all", "all", 1000), (1, 20, 13), (2, 33, 39), ("all", 16, 200)]

IN_FULL = {"gemma3"}
"""Architectures that have every tiling with one row and with several, on both devices.

The others have each tiling on both devices, and with one row and several: half of them at a time.
"""


def left_padded(batch: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and mask: with several rows, all but the last padded by different lengths."""
    tokens = random_tokens(batch, PROMPT)
    mask = torch.ones_like(tokens)
    for row in range(batch - 1):
        mask[row, : 37 - 14 * row] = 0
    return tokens, mask


def generate(
    model: PreTrainedModel, cache: Cache, tokens: torch.Tensor, mask: torch.Tensor
) -> GenerateDecoderOnlyOutput:
    return model.generate(
        tokens,
        attention_mask=mask,
        past_key_values=cache,
        max_new_tokens=NEW,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
        pad_token_id=0,
    )


@functools.cache
def stock_generation(name: str, batch: int) -> GenerateDecoderOnlyOutput:
    model = shared_model(name)
    return generate(model, DynamicCache(config=model.config), *left_padded(batch))


def logits(output: GenerateDecoderOnlyOutput) -> torch.Tensor:
    return torch.stack(output.logits)


def relative_error(actual: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((actual.double() - wanted.double()).abs().max() / wanted.double().abs().max()).item()


@pytest.mark.covering
@pytest.mark.parametrize("device", ["cpu", "simulated"])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_generation_equals_stock(name: str, batch: int, device: str) -> None:
    model, stock = shared_model(name), stock_generation(name, batch)
    tokens, mask = left_padded(batch)
    tilings = TILINGS
    if name not in IN_FULL:
        tilings = TILINGS[(device == "cpu") != (batch == 1) :: 2]
    for tile_heads, tile_tokens, chunk_tokens in tilings:
        with headinfer.attach(
            model,
            device=device,
            tile_heads=tile_heads,
            tile_tokens=tile_tokens,
            chunk_tokens=chunk_tokens,
        ) as offload:
            ours = generate(model, offload.new_cache(), tokens, mask)
        assert relative_error(logits(ours), logits(stock)) < TOLERANCE
        assert torch.equal(ours.sequences, stock.sequences)


@pytest.mark.covering(most=8)
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_generation_with_resident_and_host_attended_tokens_equals_stock(
    name: str, batch: int
) -> None:
    model, stock = shared_model(name), stock_generation(name, batch)
    tokens, mask = left_padded(batch)
    shares = [(50, 0.5), ("all", "off")]
    if batch == 1:  # the host has no part in others
        shares += [(0, 1.0), (100, 0.1)]
    for resident_tokens, host_attention in shares:
        with headinfer.attach(
            model,
            device="simulated",
            tile_heads=1,
            tile_tokens=20,
            chunk_tokens=39,
            resident_tokens=resident_tokens,
            host_attention=host_attention,
        ) as offload:
            ours = generate(model, offload.new_cache(), tokens, mask)
        assert relative_error(logits(ours), logits(stock)) < TOLERANCE
        assert torch.equal(ours.sequences, stock.sequences)
        # Padded batches leave nothing to the host.
        if offload.plan.shape.full_layers and batch == 1 and host_attention != "off":
            assert offload.stats.bytes_attended_on_host > 0
        else:
            assert offload.stats.bytes_attended_on_host == 0


def test_residents_grow_with_the_conversation() -> None:
    model = shared_model("llama3")
    stock = DynamicCache(config=model.config)
    with headinfer.attach(model, device="simulated", device_memory="64MiB") as offload:
        cache = offload.new_cache()
        for length in (31, 3, 200, 1, 1, 1000):
            tokens = random_tokens(1, length)
            ours = model(tokens, past_key_values=cache).logits
            wanted = model(tokens, past_key_values=stock).logits
            assert relative_error(ours, wanted) < TOLERANCE
            assert cache.state.engine.plan.resident_tokens >= cache.get_seq_length()
        # Planned for a thousand tokens more than the first prompt, and once for more than that.
        refetched = offload.plan.shape.kv_bytes(31 + 3 + 200 + 1 + 1)
        assert offload.stats.bytes_to_device == refetched


def test_residents_are_given_up_where_another_cache_needs_their_memory() -> None:
    model = shared_model("llama3")
    tokens, following = random_tokens(1, 300), random_tokens(1, 3)
    options = {"chunk_tokens": 64, "tile_heads": 1, "tile_tokens": 64, "device": "simulated"}
    with headinfer.attach(model, resident_tokens="all", **options) as offload:
        budget = offload.session.plan_for(1, 300).total_device_bytes + 100
    stock = DynamicCache(config=model.config)
    model(tokens, past_key_values=stock)
    wanted = model(following, past_key_values=stock).logits
    with headinfer.attach(model, device_memory=budget, **options) as offload:
        caches = [offload.new_cache(), offload.new_cache()]
        for cache in caches:
            model(tokens, past_key_values=cache)
        plans = [cache.state.engine.plan for cache in caches]
        assert plans[0].resident_tokens == 0
        assert 0 < plans[1].resident_tokens < 300
        held = sum(plan.arena_bytes for plan in plans)
        assert held + plans[0].shape.weights_bytes + plans[0].activation_bytes <= budget
        for cache in caches:
            ours = model(following, past_key_values=cache).logits
            assert relative_error(ours, wanted) < TOLERANCE


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_prefill_logits_of_every_position_equal_stock(name: str) -> None:
    model = shared_model(name)
    tokens = random_tokens(1, PROMPT)
    stock = model(tokens).logits
    with headinfer.attach(
        model, device="simulated", tile_heads=1, tile_tokens=20, chunk_tokens=25
    ) as offload:
        ours = model(tokens, past_key_values=offload.new_cache()).logits
        without_cache = model(tokens, use_cache=False).logits
    assert ours.shape == stock.shape
    assert relative_error(ours, stock) < TOLERANCE
    assert relative_error(without_cache, stock) < TOLERANCE


@pytest.mark.covering
@pytest.mark.parametrize("device", ["cpu", "simulated"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["llama3", "gemma2", "gpt-oss", "qwen3", "mistral-sliding"])
def test_half_precision_is_as_near_to_float64_as_stock(
    name: str, dtype: torch.dtype, device: str
) -> None:
    tokens = random_tokens(1, PROMPT)
    model = tiny_model(name)
    model.to(dtype)
    stock = model(tokens).logits.double()
    with headinfer.attach(
        model, device=device, tile_heads=1, tile_tokens=20, chunk_tokens=25
    ) as offload:
        ours = model(tokens, past_key_values=offload.new_cache()).logits.double()
    if name == "gpt-oss":
        model.set_experts_implementation("eager")  # the grouped one has no float64
    exact = model.to(torch.float64)(tokens).logits
    stock_distance = (stock - exact).norm()
    assert stock_distance > 0
    assert (ours - exact).norm() <= 1.5 * stock_distance


def test_synchronous_twin_gives_the_very_same_result() -> None:
    model = tiny_model("llama3").to(torch.float64)
    tokens = random_tokens(2, PROMPT)
    mask = torch.ones_like(tokens)  # stock eager gives NaN for padding in float64
    stock = generate(model, DynamicCache(config=model.config), tokens, mask)
    results = []
    for overlap in (True, False):
        with headinfer.attach(
            model, device="simulated", overlap=overlap, tile_heads=2, tile_tokens=30
        ) as offload:
            ours = generate(model, offload.new_cache(), tokens, mask)
        # Stock eager takes its softmax in float32 even here.
        assert relative_error(logits(ours), logits(stock)) < 1e-6
        results.append(logits(ours))
    assert torch.equal(*results)
