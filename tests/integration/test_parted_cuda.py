"""Models whose layers lie on two GPUs, against stock on one; run with `pytest -m gpu`."""

import copy
import importlib.util
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import DynamicCache, PreTrainedModel

import headinfer
from headinfer.demo import ensure_model
from headinfer.integration.calls import cache_argument
from headinfer.schedule import route
from parted import device_map, split_by_hand, split_over_gpus
from tiny_models import ARCHITECTURES, random_tokens, tiny_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there are fewer than two GPUs"),
]

needs_accelerate = pytest.mark.skipif(
    importlib.util.find_spec("accelerate") is None, reason="there is no accelerate"
)
SPLITS = [
    pytest.param(split_over_gpus, marks=needs_accelerate, id="accelerate"),
    pytest.param(split_by_hand, id="hand"),
]
SETTINGS: list[dict[str, Any]] = [
    {"tile_heads": 1, "tile_tokens": 50, "chunk_tokens": 128, "resident_tokens": 0},
    {"tile_tokens": 64, "chunk_tokens": 77, "resident_tokens": 100, "host_attention": 0.5},
    {"resident_tokens": "all"},
]

Split = Callable[[PreTrainedModel, list[int]], PreTrainedModel]


def generate(model: PreTrainedModel, cache: Any, tokens: torch.Tensor, mask: torch.Tensor) -> Any:
    return model.generate(
        tokens,
        attention_mask=mask,
        **cache_argument(model, cache),
        max_new_tokens=80,  # past a page of the decode tail
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
        pad_token_id=0,
    )


def error_of(ours: Any, stock: Any) -> float:
    """Compare the steps up to the first token that differs, which must be some."""
    got, wanted = torch.stack(ours.logits).cuda(0), torch.stack(stock.logits).cuda(0)
    chosen = (each.sequences.cuda(0)[:, -len(got) :] for each in (ours, stock))
    same = torch.eq(*chosen).all(dim=0).long().cumprod(0)
    steps = int(same.sum())
    assert steps > 3
    got, wanted = got[:steps].float(), wanted[:steps].float()
    return float((got - wanted).abs().max() / wanted.abs().max())


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_logits_equal_stock_in_float32(name: str, split: Split) -> None:
    model = tiny_model(name).to("cuda:0")
    tokens = random_tokens(2, 300).cuda(0)
    mask = torch.ones_like(tokens)
    mask[0, :41] = 0
    stock = generate(model, DynamicCache(config=model.config), tokens, mask)
    layers = len(model.model.layers)
    model = split(model, [0] + [1] * (layers - 1))
    for settings in SETTINGS:
        with headinfer.attach(model, **settings) as offload:
            ours = generate(model, offload.new_cache(), tokens, mask)
        assert error_of(ours, stock) < 1e-4
        assert torch.equal(ours.sequences, stock.sequences)


@pytest.mark.parametrize("split", SPLITS)
def test_tokens_lie_where_their_layers_are(split: Split) -> None:
    model, tokens = tiny_model("llama3"), random_tokens(1, 4000).cuda(0)
    model = split(model.to("cuda:0"), [0, 1, 1])
    with headinfer.attach(model, resident_tokens="all", device_memory="4GiB") as offload:
        first = offload.new_cache()  # with it come workspaces of cuBLAS, which stay
        model(tokens, **cache_argument(model, first), logits_to_keep=1)
        first.close()
        before = [torch.cuda.memory_allocated(gpu) for gpu in (0, 1)]
        cache = offload.new_cache()
        model(tokens, **cache_argument(model, cache), logits_to_keep=1)
        plans = cache.state.engine.plan.parts
        held = [torch.cuda.memory_allocated(gpu) - before[gpu] for gpu in (0, 1)]
        for plan, more in zip(plans, held, strict=True):
            assert plan.arena_bytes <= more <= plan.arena_bytes + 2**22
        assert plans[1].resident_bytes == 2 * plans[0].resident_bytes > 0
        assert [str(layer.keys.device) for layer in cache.layers] == ["cuda:0", "cuda:1", "cuda:1"]
        token = tokens[:, :1]
        wanted = model(token, **cache_argument(model, copied := copy.deepcopy(cache))).logits
        for layer in cache.layers:
            assert layer.keys.shape[2] == 4000
        copied.crop(-1)
        again = model(token, **cache_argument(model, copied)).logits
        torch.testing.assert_close(again, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("split", SPLITS)
def test_half_precision_on_streams_of_the_caller(split: Split) -> None:
    model = tiny_model("llama3", head_dim=64).to("cuda:0", torch.bfloat16)
    tokens = random_tokens(1, 700).cuda(0)
    mask = torch.ones_like(tokens)
    options = {"tile_tokens": 64, "chunk_tokens": 128, "resident_tokens": 0}
    with headinfer.attach(model, **options, capture=False) as offload:
        wanted = generate(model, offload.new_cache(), tokens, mask)
    model = split(model, [0, 1, 0])
    streams = [torch.cuda.Stream(gpu) for gpu in (0, 1)]
    for gpu in (0, 1):
        torch.cuda.synchronize(gpu)
    with headinfer.attach(model, **options) as offload:
        ours = generate(model, offload.new_cache(), tokens, mask)
        with torch.cuda.stream(streams[1]), torch.cuda.stream(streams[0]):
            others = generate(model, offload.new_cache(), tokens, mask)
        for gpu in (0, 1):
            torch.cuda.synchronize(gpu)
    for result in (ours, others):
        assert error_of(result, wanted) < 0.02


@pytest.mark.parametrize("capture", [True, False])
def test_a_model_on_a_gpu_that_is_not_the_current_one(capture: bool) -> None:
    model, tokens = tiny_model("llama3"), random_tokens(1, 300)
    mask = torch.ones_like(tokens)
    results, keys = [], []
    for gpu in (0, 1):
        model.to(f"cuda:{gpu}")
        for settings in SETTINGS:
            with headinfer.attach(model, **settings, capture=capture) as offload:
                cache = offload.new_cache()
                results.append(generate(model, cache, tokens.cuda(gpu), mask.cuda(gpu)))
                keys.append(cache.layers[2].keys)
                assert keys[-1].device.index == gpu
    for at in range(3):
        assert error_of(results[at + 3], results[at]) < 1e-5
        torch.testing.assert_close(keys[at + 3].cuda(0), keys[at], rtol=1e-4, atol=1e-4)


@needs_accelerate
@pytest.mark.parametrize("layers", [[0, "cpu", 1], ["cpu", 0, 0]])
def test_weights_in_cpu_memory_are_brought(layers: list[int | str]) -> None:
    import accelerate

    model, tokens = tiny_model("llama3"), random_tokens(1, 300).cuda(0)
    mask = torch.ones_like(tokens)
    stock = generate(model.cuda(0), DynamicCache(config=model.config), tokens, mask)
    places = device_map(model, layers)
    model = accelerate.dispatch_model(model.cpu(), places, main_device=0)
    for settings in SETTINGS:
        with headinfer.attach(model, **settings) as offload:
            ours = generate(model, offload.new_cache(), tokens, mask)
        assert error_of(ours, stock) < 1e-4


@needs_accelerate
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("settings", [*SETTINGS, SETTINGS[0] | {"overlap": False}])
def test_captured_steps_give_the_bits_of_launched_ones(
    settings: dict[str, Any], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(route, "STEADY_TOKENS", 48)
    monkeypatch.setattr(route, "_STEADY_FROM", 0)
    tokens = random_tokens(2, 300).cuda(0)
    mask = torch.ones_like(tokens)
    model = split_over_gpus(tiny_model("llama3", head_dim=64).to("cuda:0", dtype), [0, 1, 1])
    results = []
    for capture in (False, True):
        with headinfer.attach(model, **settings, fuse="off", capture=capture) as offload:
            cache = offload.new_cache()
            results.append(generate(model, cache, tokens, mask))
            stats = offload.stats
    assert stats.captures > 0
    assert stats.captured_steps > 60
    assert torch.equal(results[0].sequences, results[1].sequences)
    assert all(map(torch.equal, results[0].logits, results[1].logits))


@needs_accelerate
def test_fused_steps_are_captured_on_two_gpus() -> None:
    model = tiny_model("llama3", head_dim=64).to("cuda:0", torch.bfloat16)
    tokens = random_tokens(1, 300).cuda(0)
    mask = torch.ones_like(tokens)
    with headinfer.attach(model, resident_tokens="all", capture=False) as offload:
        wanted = generate(model, offload.new_cache(), tokens, mask)
    model = split_over_gpus(model, [0, 1, 1])
    with headinfer.attach(model, resident_tokens="all") as offload:
        ours = generate(model, offload.new_cache(), tokens, mask)
    assert offload.stats.captured_steps > 60
    assert error_of(ours, wanted) < 0.02


@needs_accelerate
def test_a_model_is_loaded_over_two_gpus() -> None:
    texts = []
    for gpus in (None, 2):
        parts = headinfer.generate(
            ensure_model(),
            "The strongbox of the mossy phoenix opens with",
            gpus=gpus,
            device="cuda",
            max_new_tokens=12,
        )
        texts.append("".join(part.text for part in parts))
    assert texts[0] == texts[1] != ""
