"""Models whose layers lie on several devices, against the whole ones and stock."""

import copy
from typing import Any

import pytest
import torch
from transformers import DynamicCache, PreTrainedModel

import headinfer
from families import tiny_family
from generation_modes import MODES, compare, stock
from headinfer.engine.engine import Engine
from headinfer.errors import CacheStateError, MemoryPlanError, OptionError
from headinfer.integration.calls import cache_argument
from headinfer.integration.model_shape import model_shape
from headinfer.units import parse_bytes
from parted import spread
from tiny_models import ARCHITECTURES, random_tokens, shared_model, tiny_model

PROMPT, NEW, TOLERANCE = 117, 12, 1e-5

# (tile_heads, tile_tokens, chunk_tokens, resident_tokens, host_attention)
SETTINGS = [
    ("all", "all", 1000, 0, "off"),
    (1, 20, 13, 0, "off"),
    (2, 33, 39, 50, 0.5),
    (1, 16, 200, "all", "off"),
]


def options_of(settings: tuple[Any, ...]) -> dict[str, Any]:
    names = ("tile_heads", "tile_tokens", "chunk_tokens", "resident_tokens", "host_attention")
    return {"device": "simulated", **dict(zip(names, settings, strict=True))}


def attending(model: PreTrainedModel) -> int:
    """Return how many layers attend."""
    return len(model_shape(model).attention_layers)


def generate(model: PreTrainedModel, cache: Any, tokens: torch.Tensor, mask: torch.Tensor) -> Any:
    return model.generate(
        tokens,
        attention_mask=mask,
        **cache_argument(model, cache),
        max_new_tokens=NEW,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
        pad_token_id=0,
    )


def logits(output: Any) -> torch.Tensor:
    return torch.stack(output.logits)


def relative_error(actual: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((actual.double() - wanted.double()).abs().max() / wanted.double().abs().max()).item()


@pytest.mark.covering(most=5)
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_generation_equals_the_whole_model_and_stock(name: str, batch: int) -> None:
    model, tokens = shared_model(name), random_tokens(batch, PROMPT)
    mask = torch.ones_like(tokens)
    for row in range(batch - 1):
        mask[row, : 37 - 14 * row] = 0
    wanted = generate(model, DynamicCache(config=model.config), tokens, mask)
    layers = attending(model)
    for number, settings in enumerate(SETTINGS[batch == 1 :: 2]):
        first = 1 + number % (layers - 1)
        devices = spread(*[0] * first, *[1] * (layers - first), seed=number)
        results = []
        for where in (devices, None):
            with headinfer.attach(model, simulated_device=where, **options_of(settings)) as offload:
                results.append(generate(model, offload.new_cache(), tokens, mask))
        ours, whole = results
        assert torch.equal(logits(ours), logits(whole))
        assert relative_error(logits(ours), logits(wanted)) < TOLERANCE
        assert torch.equal(ours.sequences, wanted.sequences)
        for device in devices:
            device.memory.check()


@pytest.mark.covering(most=1)
@pytest.mark.parametrize("layers", [(0, 1, 0), (1, 0, 2), (0, 1, 1)])
def test_layers_may_lie_in_any_order(layers: tuple[int, ...]) -> None:
    model, tokens = shared_model("llama3"), random_tokens(1, 90)
    whole = None
    for where in (None, spread(*layers)):
        with headinfer.attach(
            model, simulated_device=where, **options_of((1, 20, 13, 9, 0.4))
        ) as offload:
            result = generate(model, offload.new_cache(), tokens, torch.ones_like(tokens))
        whole = whole or result
    assert torch.equal(logits(result), logits(whole))


@pytest.mark.covering(most=6)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["LlamaForCausalLM", "Gemma3ForCausalLM"])
def test_all_ways_of_generating_equal_stock(name: str, mode: str) -> None:
    model = tiny_family(name)
    expected = stock(model, mode)
    layers = attending(model)
    with headinfer.attach(
        model,
        simulated_device=spread(0, *[1] * (layers - 1)),
        **options_of((1, 20, 13, 9, 0.4)),
    ) as offload:
        ours = MODES[mode](model, offload.new_cache)
    assert compare(ours, expected) in ("equal", "tie")


def test_heads_that_stream_do_so_on_their_device() -> None:
    model, tokens = shared_model("llama3"), random_tokens(2, 90)
    streaming = {
        "sparsity": 0.5,
        "head_pattern": "random:3",
        "sink_tokens": 5,
        "recent_tokens": 24,
        **options_of((1, 20, 13, 9, 0.4)),
    }
    results = []
    for where in (None, spread(0, 1, 1)):
        with headinfer.attach(model, simulated_device=where, **streaming) as offload:
            cache = offload.new_cache()
            results.append(generate(model, cache, tokens, torch.ones_like(tokens)))
    assert torch.equal(logits(results[0]), logits(results[1]))


def test_a_copy_goes_on_by_itself() -> None:
    model, tokens = shared_model("llama3"), random_tokens(2, 60)
    question = random_tokens(2, 7, seed=5)
    longer = torch.cat((tokens, question), dim=1)
    wanted, wanted_other = model(longer).logits[:, -7:], model(tokens).logits[:, -20:]
    with headinfer.attach(
        model, simulated_device=spread(0, 1, 1), **options_of((1, 20, 13, 9, 0.4))
    ) as offload:
        cache = offload.new_cache()
        model(tokens, **cache_argument(model, cache))
        copied = copy.deepcopy(cache)
        cache.crop(-20)
        ours = model(question, **cache_argument(model, copied)).logits
        other = model(tokens[:, -20:], **cache_argument(model, cache)).logits
        assert [layer.keys.shape[2] for layer in copied.layers] == [67] * 3
        cache.close()
        with pytest.raises(CacheStateError, match="closed"):
            model(question, **cache_argument(model, cache))
    assert relative_error(ours, wanted) < TOLERANCE
    assert relative_error(other, wanted_other) < TOLERANCE


def test_each_device_has_an_arena_for_its_layers() -> None:
    model, tokens = shared_model("llama3"), random_tokens(1, 60)
    first, second, _ = devices = spread(0, 1, 1)
    with headinfer.attach(
        model, simulated_device=devices, **options_of((1, 20, 13, 9, 0.4))
    ) as offload:
        cache = offload.new_cache()
        model(tokens, **cache_argument(model, cache))
        plans = cache.state.engine.plan.parts
        assert [len(plan.shape.attention_layers) for plan in plans] == [1, 2]
        assert [first.peak_bytes, second.peak_bytes] == [plan.arena_bytes for plan in plans]
        assert plans[1].resident_bytes == 2 * plans[0].resident_bytes
        assert offload.stats.peak_device_kv_bytes == first.peak_bytes + second.peak_bytes
        whole = model_shape(model).kv_bytes(60)
        assert offload.stats.host_kv_bytes >= whole
        text = str(offload.plan)
        assert "device 1 of 2, 1 layer: simulated GPU memory" in text
        assert "device 2 of 2, 2 layers: simulated GPU memory" in text
    assert first.allocated_bytes == second.allocated_bytes == 0


def test_memory_is_for_each_device_or_one_value_for_each() -> None:
    model = shared_model("llama3")
    options = options_of((1, 64, 128, "auto", "off"))
    devices = spread(0, 1, 1)
    with headinfer.attach(
        model, simulated_device=devices, device_memory="4MiB", **options
    ) as offload:
        assert [plan.device_memory_bytes for plan in offload.plan.parts] == [4 * 2**20] * 2
        assert all(plan.fits for plan in offload.plan.parts)
    for given in ("3MiB,4MiB", ["3MiB", 4 * 2**20]):
        with headinfer.attach(
            model, simulated_device=devices, device_memory=given, **options
        ) as offload:
            budgets = [plan.device_memory_bytes for plan in offload.plan.parts]
            assert budgets == [parse_bytes("3MiB"), parse_bytes("4MiB")]
            plans = offload.session.plan_for(1, 4000).parts
            assert 0 < plans[1].resident_tokens < plans[0].resident_tokens
    with pytest.raises(OptionError, match=r"has 3 values, .* lie on 2 devices; give one value"):
        headinfer.attach(model, simulated_device=devices, device_memory="3MiB,4MiB,4MiB", **options)
    with pytest.raises(OptionError, match=r"has 2 values, .* lie on 1 device"):
        headinfer.attach(model, device_memory="3MiB,4MiB", **options)
    with pytest.raises(
        MemoryPlanError, match=r"^device 2 of 2, 2 layers: the device memory of 100"
    ):
        headinfer.attach(model, simulated_device=devices, device_memory="3MiB,100KiB", **options)


def test_chunks_are_those_that_every_device_has_room_for() -> None:
    model, tokens = tiny_model("llama3", max_position_embeddings=2**14), random_tokens(1, 900)
    wanted = model(tokens).logits
    with headinfer.attach(
        model,
        device="simulated",
        simulated_device=spread(0, 1, 1),
        device_memory="64MiB,1300KiB",
    ) as offload:
        chunks = [plan.chunk_tokens for plan in offload.plan.parts]
        ours = model(tokens, **cache_argument(model, offload.new_cache())).logits
    assert chunks[0] == chunks[1] == offload.plan.chunk_tokens < 8192
    assert relative_error(ours, wanted) < TOLERANCE


def test_residents_are_given_up_on_all_devices_where_another_cache_needs_their_memory() -> None:
    model, tokens = shared_model("llama3"), random_tokens(1, 300)
    following = random_tokens(1, 3)
    wanted = model(torch.cat((tokens, following), dim=1)).logits[:, -3:]
    options = {"chunk_tokens": 64, "tile_heads": 1, "tile_tokens": 64, "device": "simulated"}
    with headinfer.attach(
        model, simulated_device=spread(0, 1, 1), resident_tokens="all", **options
    ) as offload:
        plans = offload.session.plan_for(1, 300).parts
        budgets = [f"{plan.total_device_bytes + 100}B" for plan in plans]
    with headinfer.attach(
        model, simulated_device=spread(0, 1, 1), device_memory=budgets, **options
    ) as offload:
        caches = [offload.new_cache(), offload.new_cache()]
        for cache in caches:
            model(tokens, **cache_argument(model, cache))
        kept = [[p.resident_tokens for p in cache.state.engine.plan.parts] for cache in caches]
        assert kept[0] == [0, 0]
        assert all(0 < tokens < 300 for tokens in kept[1])
        for cache in caches:
            ours = model(following, **cache_argument(model, cache)).logits
            assert relative_error(ours, wanted) < TOLERANCE


def test_residents_grow_with_the_conversation() -> None:
    model = shared_model("llama3")
    stock_cache = DynamicCache(config=model.config)
    with headinfer.attach(
        model,
        device="simulated",
        simulated_device=spread(0, 0, 1),
        device_memory=["64MiB", "1100KiB"],
        tile_tokens=64,
        chunk_tokens=64,
    ) as offload:
        cache = offload.new_cache()
        for length in (31, 3, 200, 1, 1500, 600):
            tokens = random_tokens(1, length)
            ours = model(tokens, **cache_argument(model, cache)).logits
            wanted = model(tokens, **cache_argument(model, stock_cache)).logits
            assert relative_error(ours, wanted) < TOLERANCE
        first, second = cache.state.engine.plan.parts
        assert second.resident_tokens < cache.get_seq_length() <= first.resident_tokens


def test_there_must_be_a_device_for_each_layer() -> None:
    with pytest.raises(OptionError, match=r"2 simulated devices.* 3 attention layers"):
        headinfer.attach(shared_model("llama3"), device="simulated", simulated_device=spread(0, 1))


def test_a_call_that_takes_no_chunks_has_room_on_each_device() -> None:
    model, tokens = shared_model("llama3"), random_tokens(1, 400)
    wanted = model(tokens, output_hidden_states=True)
    with headinfer.attach(
        model,
        device="simulated",
        simulated_device=spread(0, 1, 1),
        device_memory="4MiB",
        chunk_tokens=64,
        tile_tokens=64,
    ) as offload:
        cache = offload.new_cache()
        model(tokens[:, :90], **cache_argument(model, cache))
        before = cache.state.engine.plan.parts
        cache.crop(-90)
        ours = model(tokens, **cache_argument(model, cache), output_hidden_states=True)
        plans = cache.state.engine.plan.parts
        assert [plan.whole_tokens for plan in plans] == [400, 400]
        assert all(plan.fits for plan in plans)
        for plan, old in zip(plans, before, strict=True):
            assert plan.activation_bytes > old.activation_bytes
        with pytest.raises(MemoryPlanError, match="does not hold 9,000 tokens at once"):
            model(random_tokens(1, 9000), output_hidden_states=True)
    assert relative_error(ours.logits, wanted.logits) < TOLERANCE
    assert relative_error(ours.hidden_states[2], wanted.hidden_states[2]) < TOLERANCE


@pytest.mark.covering
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("at", [0, 1])
def test_rows_that_changed_on_some_devices_alone_are_refused(
    at: int, error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokens = shared_model("llama3"), random_tokens(2, 40)
    wanted = model(tokens).logits
    select, calls = Engine.select_all, []

    def broken_off(*args: Any) -> None:
        calls.append(args)
        if len(calls) == at + 1:
            raise error
        select(*args)

    with headinfer.attach(
        model, simulated_device=spread(0, 1, 1), **options_of((1, 20, 13, 9, 0.4))
    ) as offload:
        cache = offload.new_cache()
        model(tokens, **cache_argument(model, cache))
        with monkeypatch.context() as patch:
            patch.setattr(Engine, "select_all", broken_off)
            with pytest.raises(error):
                cache.batch_repeat_interleave(2)
        if at == 0:  # nothing has changed yet
            model(tokens[:, :1], **cache_argument(model, cache))
        else:
            with pytest.raises(CacheStateError, match=r"was interrupted.* call reset\(\)"):
                model(random_tokens(4, 1), **cache_argument(model, cache))
        cache.reset()
        ours = model(tokens, **cache_argument(model, cache)).logits
    assert relative_error(ours, wanted) < TOLERANCE
