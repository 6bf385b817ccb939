"""Models whose heads stream in part, against stock ones that mask these heads."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache, PreTrainedModel

import headinfer
from captured import few, launched, with_and_without_capture
from headinfer.errors import CacheStateError, OptionError, UnsupportedModelError
from headinfer.finding.masked import masked_heads
from headinfer.heads.formats import write_pattern
from headinfer.heads.pattern import HeadPattern
from headinfer.integration.model_shape import model_shape
from headinfer.plan.streaming import kv_heads_of, random_pattern
from tiny_models import random_tokens, shared_model, tiny_model

SINKS, RECENT = 5, 24
STREAMING: dict[str, Any] = {
    "sparsity": 0.5,
    "head_pattern": "random:3",
    "sink_tokens": SINKS,
    "recent_tokens": RECENT,
}


def streaming_heads(model: PreTrainedModel, sparsity: float = 0.5) -> tuple[tuple[int, ...], ...]:
    """Return the heads that `STREAMING` chooses."""
    shape = model_shape(model)
    pattern = random_pattern("random:3", kv_heads_of(shape))
    assert pattern is not None
    full = [at for at, layer in enumerate(shape.layers) if layer.kind.value == "full"]
    return pattern.streaming_heads(sparsity, full)


def generated(model: PreTrainedModel, tokens: torch.Tensor, cache: Any, **options: Any) -> Any:
    return model.generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        past_key_values=cache,
        **{"max_new_tokens": 30, "do_sample": False, "pad_token_id": 0, **options},
        return_dict_in_generate=True,
        output_logits=True,
    )


def masked(model: PreTrainedModel, tokens: torch.Tensor, **options: Any) -> Any:
    """Return what a stock model generates that masks the heads which `STREAMING` chooses."""
    heads = streaming_heads(model)
    with masked_heads(model, heads, sink_tokens=SINKS, recent_tokens=RECENT):
        return generated(model, tokens, DynamicCache(config=model.config), **options)


def assert_same(ours: Any, wanted: Any) -> None:
    assert torch.equal(ours.sequences, wanted.sequences)
    got, expected = torch.stack(ours.logits), torch.stack(wanted.logits)
    error = (got - expected).abs().max() / expected.abs().max()
    assert error < 1e-5


@pytest.mark.covering(most=3)
@pytest.mark.parametrize("device", ["cpu", "simulated"])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", ["llama3", "qwen2", "gemma2", "qwen3-moe"])
def test_generation_equals_that_of_a_masked_model(name: str, batch: int, device: str) -> None:
    model, tokens = shared_model(name), random_tokens(batch, 117)
    wanted = masked(model, tokens)
    tilings = [(1, 20, 13, 0), (1, 33, 39, 50)]
    for tile_heads, tile_tokens, chunk_tokens, resident in tilings:
        with headinfer.attach(
            model,
            device=device,
            tile_heads=tile_heads,
            tile_tokens=tile_tokens,
            chunk_tokens=chunk_tokens,
            resident_tokens=resident,
            host_attention=0.5 if resident else "off",
            **STREAMING,
        ) as offload:
            assert_same(generated(model, tokens, offload.new_cache()), wanted)


def test_without_heads_that_stream_nothing_changes() -> None:
    model, tokens = shared_model("llama3"), random_tokens(2, 60)
    outputs = []
    for options in ({}, {"sparsity": 0.0}, {**STREAMING, "recent_tokens": 200}):
        with headinfer.attach(model, device="simulated", **options) as offload:
            outputs.append(generated(model, tokens, offload.new_cache()))
    assert torch.equal(torch.stack(outputs[0].logits), torch.stack(outputs[1].logits))
    assert_same(outputs[2], outputs[0])


def test_all_heads_may_stream() -> None:
    model, tokens = shared_model("llama3"), random_tokens(1, 90)
    options = {**STREAMING, "sparsity": 1.0}
    heads = [range(4)] * 3
    with masked_heads(model, heads, sink_tokens=SINKS, recent_tokens=RECENT):
        wanted = generated(model, tokens, DynamicCache(config=model.config))
    with headinfer.attach(model, device="simulated", **options) as offload:
        assert_same(generated(model, tokens, offload.new_cache()), wanted)
        assert offload.stats.host_kv_bytes == 0
        assert offload.stats.bytes_to_device == 0


def test_beams_crops_and_copies_hold() -> None:
    model, tokens = shared_model("llama3"), random_tokens(1, 70)
    wanted = masked(model, tokens, num_beams=3, max_new_tokens=12)
    with headinfer.attach(
        model, device="simulated", tile_heads=1, tile_tokens=16, chunk_tokens=12, **STREAMING
    ) as offload:
        ours = generated(model, tokens, offload.new_cache(), num_beams=3, max_new_tokens=12)
        assert torch.equal(ours.sequences, wanted.sequences)
        cache = offload.new_cache()
        first = model(tokens, past_key_values=cache).logits[:, -1]
        fork = copy.deepcopy(cache)
        for step in range(5):
            model(tokens[:, step : step + 1], past_key_values=cache)
        cache.crop(-6)
        for branch, new in ((cache, tokens[:, -1:]), (fork, tokens[:, :3])):
            again = model(new, past_key_values=branch).logits[:, -1]
            if branch is cache:
                torch.testing.assert_close(again, first, rtol=1e-4, atol=1e-5)
            else:
                with masked_heads(
                    model_detached(offload, model),
                    streaming_heads(model),
                    sink_tokens=SINKS,
                    recent_tokens=RECENT,
                ):
                    stock = model(torch.cat((tokens, new), dim=1)).logits[:, -1]
                torch.testing.assert_close(again, stock, rtol=1e-4, atol=1e-5)


def model_detached(offload: Any, model: PreTrainedModel) -> PreTrainedModel:
    offload.detach()
    return model


@pytest.mark.covering(most=1)
@pytest.mark.parametrize("rows", [1, 2])
def test_steps_with_streaming_heads_are_captured(rows: int) -> None:
    model, tokens = tiny_model("llama3"), random_tokens(rows, 40)

    def use(offload: Any) -> list[torch.Tensor]:
        output = generated(model, tokens, offload.new_cache(), max_new_tokens=60)
        return [output.sequences, torch.stack(output.logits)]

    stats, captured = with_and_without_capture(model, use, **STREAMING)
    assert stats.captures == 1
    assert launched(stats) == few(40, 59)
    wanted = masked(model, tokens, max_new_tokens=60)
    assert torch.equal(captured[0], wanted.sequences)


def test_steps_that_stream_tiles_are_captured_in_pieces() -> None:
    model, tokens = tiny_model("llama3"), random_tokens(1, 90)
    options = {"resident_tokens": 20, "tile_heads": 1, "tile_tokens": 16, "host_attention": 0.4}
    outputs = []
    for capture in (False, True):
        with headinfer.attach(
            model, device="simulated", capture=capture, **options, **STREAMING
        ) as offload:
            outputs.append(generated(model, tokens, offload.new_cache()))
            stats = offload.stats
    assert stats.captured_steps > 20
    assert torch.equal(torch.stack(outputs[0].logits), torch.stack(outputs[1].logits))
    assert_same(outputs[1], masked(model, tokens))


def test_a_pattern_in_a_file_chooses_the_heads(tmp_path: Path) -> None:
    model, tokens = shared_model("llama3"), random_tokens(1, 80)
    scores = tuple((layer + 1.0, 0.0, 0.0, 9.0) for layer in range(3))
    pattern = HeadPattern(scores=scores, sink_tokens=4, recent_tokens=20)
    write_pattern(tmp_path / "heads.json", pattern)
    with headinfer.attach(
        model, device="cpu", sparsity=0.5, head_pattern=tmp_path / "heads.json"
    ) as offload:
        assert "6 of 12 KV heads see the first 4 and the newest 20 tokens alone" in str(
            offload.plan
        )
        ours = generated(model, tokens, offload.new_cache())
    with masked_heads(model, [(1, 2)] * 3, sink_tokens=4, recent_tokens=20):
        wanted = generated(model, tokens, DynamicCache(config=model.config))
    assert_same(ours, wanted)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparsity": 0.5}, "no head_pattern says which heads stream"),
        ({"head_pattern": "random"}, "head_pattern is given, but sparsity is 0"),
        ({"sink_tokens": 4}, "sink_tokens is given, but sparsity is 0"),
        ({"recent_tokens": 4}, "recent_tokens is given, but sparsity is 0"),
        ({"sparsity": 1.5, "head_pattern": "random"}, "sparsity must be a share from 0 to 1"),
        ({"sparsity": "auto", "head_pattern": "random"}, "not 'auto'"),
        ({"sparsity": 0.5, "head_pattern": "random:x"}, "takes a number as its seed"),
        ({"sparsity": "nan", "head_pattern": "random"}, "from 0 to 1, or 'off', not 'nan'"),
        ({"sparsity": 0.001, "head_pattern": "random"}, "of the 12 KV heads .* is none of them"),
        ({"sparsity": 0.5, "head_pattern": "no/such"}, "no/such"),
        ({**STREAMING, "sink_tokens": -1}, "sink_tokens must be an integer from 0 on"),
        ({**STREAMING, "recent_tokens": 0}, "recent_tokens must be a positive integer"),
    ],
)
def test_what_means_nothing_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        headinfer.attach(shared_model("llama3"), **options)


def test_a_pattern_of_another_model_is_refused_with_both_shapes(tmp_path: Path) -> None:
    place = tmp_path / "heads.json"
    write_pattern(place, HeadPattern(scores=((1.0,) * 8,) * 3))
    with pytest.raises(OptionError, match=r"3 layers x 8 KV heads.*3 layers x 4 KV heads"):
        headinfer.attach(shared_model("llama3"), sparsity=0.5, head_pattern=place)
    assert json.loads(place.read_text())


def test_padding_is_refused_before_anything_is_kept() -> None:
    model, tokens = shared_model("llama3"), random_tokens(2, 40)
    mask = torch.ones_like(tokens)
    mask[0, :7] = 0
    with headinfer.attach(model, device="simulated", **STREAMING) as offload:
        cache = offload.new_cache()
        with pytest.raises(UnsupportedModelError, match="rows with padding are not served"):
            model(tokens, attention_mask=mask, past_key_values=cache)
        assert cache.get_seq_length() == 0
        model(tokens, past_key_values=cache)


def test_keys_are_not_read_where_heads_stream() -> None:
    model = shared_model("llama3")
    with headinfer.attach(model, device="simulated", **STREAMING) as offload:
        cache = offload.new_cache()
        model(random_tokens(1, 40), past_key_values=cache)
        with pytest.raises(CacheStateError, match="streaming heads"):
            _ = cache.layers[0].keys
        cache.reset()
        assert cache.layers[0].keys is None


def test_calls_without_such_a_cache_are_exact_and_say_so(caplog: pytest.LogCaptureFixture) -> None:
    model, tokens = shared_model("llama3"), random_tokens(2, 60)
    mask = torch.ones_like(tokens)
    mask[0, :7] = 0
    wanted = model(tokens, attention_mask=mask).logits
    with headinfer.attach(model, device="simulated", **STREAMING):
        for arguments in ({"use_cache": False}, {"past_key_values": DynamicCache()}):
            caplog.clear()
            ours = model(tokens, attention_mask=mask, **arguments).logits
            torch.testing.assert_close(ours[:, 7:], wanted[:, 7:], rtol=1e-4, atol=1e-5)
            assert "all heads see all tokens" in caplog.text


def test_tiles_may_have_as_many_heads_as_the_model() -> None:
    model, tokens = shared_model("llama3"), random_tokens(1, 60)
    with headinfer.attach(model, device="simulated", tile_heads=4, **STREAMING) as offload:
        assert offload.plan.tile_heads <= 4
        assert_same(generated(model, tokens, offload.new_cache()), masked(model, tokens))


def test_memory_is_what_the_plan_says() -> None:
    model = shared_model("llama3")
    kept = []
    for options in ({}, STREAMING):
        with headinfer.attach(model, device="simulated", **options) as offload:
            cache = offload.new_cache()
            model(random_tokens(1, 600), past_key_values=cache)
            kept.append(offload.stats.host_kv_bytes)
            assert offload.stats.host_kv_bytes == offload.plan.kv_host_bytes(600)
            assert offload.stats.standard_kv_bytes == offload.plan.shape.exact.kv_bytes(600)
    assert kept[0] == 2 * kept[1]
