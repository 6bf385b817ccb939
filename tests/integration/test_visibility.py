"""What a layer sees is what the model masks, whatever else it says or keeps."""

import copy
from typing import Any

import pytest
import torch
from accelerate.utils import send_to_device
from transformers import DynamicCache, PreTrainedModel
from transformers.masking_utils import (
    causal_mask_function,
    create_chunked_causal_mask,
    create_sliding_window_causal_mask,
    sliding_window_causal_mask_function,
)

import headinfer
from headinfer.errors import UnsupportedModelError
from headinfer.integration.calls import cache_argument
from headinfer.integration.visibility import _edges, visible
from tiny_models import random_tokens, tiny_model

CHUNK = {"device": "cpu", "chunk_tokens": 13}
SLIDING = ["mistral-sliding", "phimoe-sliding", "qwen2-moe-sliding"]  # two pass no window on


def relative_error(actual: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((actual - wanted).abs().max() / wanted.abs().max()).item()


def call(model: PreTrainedModel, cache: Any, *lengths: int, **options: Any) -> torch.Tensor:
    """Return the logits of several calls that go on with one cache."""
    argument = cache_argument(model, cache)
    parts = [model(random_tokens(2, length), **argument, **options) for length in lengths]
    return torch.cat([part.logits for part in parts], dim=1)


@pytest.mark.covering
@pytest.mark.parametrize("window", [2, 13, 24, 400])
@pytest.mark.parametrize("name", SLIDING)
def test_windows_equal_stock(name: str, window: int) -> None:
    model = tiny_model(name, sliding_window=window)
    wanted = call(model, DynamicCache(config=model.config), 50, 1, 5, 30, 1)
    with headinfer.attach(model, **CHUNK) as offload:
        ours = call(model, offload.new_cache(), 50, 1, 5, 30, 1)
    assert relative_error(ours, wanted) < 1e-5


@pytest.mark.parametrize("name", SLIDING)
def test_windows_over_a_cache_that_keeps_everything_equal_stock(name: str) -> None:
    model = tiny_model(name)
    wanted = call(model, DynamicCache(), 50, 1, 30)
    with headinfer.attach(model):
        assert relative_error(call(model, DynamicCache(), 50, 1, 30), wanted) < 1e-5


def test_a_window_of_nothing_that_no_layer_uses_is_served() -> None:
    model = tiny_model("qwen2-moe")
    assert model.config.sliding_window == 0
    wanted = call(model, DynamicCache(config=model.config), 50, 1)
    with headinfer.attach(model, **CHUNK) as offload:
        assert relative_error(call(model, offload.new_cache(), 50, 1), wanted) < 1e-5


@pytest.mark.parametrize("name", SLIDING)
def test_a_window_of_nothing_is_refused_where_it_is_used(name: str) -> None:
    model = tiny_model(name)
    model.config.sliding_window = 0
    with headinfer.attach(model), pytest.raises(UnsupportedModelError, match="window of 0 tokens"):
        call(model, DynamicCache(), 50)


@pytest.mark.parametrize("chunk", [2, 3, 8])
def test_a_mask_of_chunks_is_not_taken_for_a_window(chunk: int) -> None:
    model = tiny_model("mistral-sliding")
    with headinfer.attach(model):
        arguments = (model.config, torch.zeros(1, 40, 8), None, None)
        mask = create_sliding_window_causal_mask(*arguments)
        assert mask.window_tokens == 24
        model.config.attention_chunk_size = chunk
        with pytest.raises(UnsupportedModelError, match="more than causal, windowed and padded"):
            create_chunked_causal_mask(*arguments)


@pytest.mark.parametrize("name", ["mistral-sliding", "phimoe-sliding"])
def test_a_window_over_an_offloaded_layer_is_refused(name: str) -> None:
    model = tiny_model(name)
    model.config.layer_types = ["full_attention"] * 3
    with (
        headinfer.attach(model) as offload,
        pytest.raises(UnsupportedModelError, match="shows 24 tokens, but its cache layer is"),
    ):
        call(model, offload.new_cache(), 50)


@pytest.mark.parametrize("cache", ["offloaded", "stock"])
def test_a_cache_that_forgets_what_the_mask_shows_is_refused(cache: str) -> None:
    model = tiny_model("llama3")
    model.config.sliding_window = 24  # read by the cache alone
    with headinfer.attach(model, **CHUNK) as offload:
        new = offload.new_cache() if cache == "offloaded" else DynamicCache(config=model.config)
        call(model, new, 5)
        with pytest.raises(UnsupportedModelError, match="but its cache keeps"):
            call(model, new, 50, 1)


@pytest.mark.parametrize(("masked", "passed"), [(24, 9), (None, 9), (9, 24)])
def test_a_keyword_that_contradicts_the_mask_is_refused(masked: int | None, passed: int) -> None:
    model = tiny_model("mistral-sliding", sliding_window=masked)
    for layer in model.model.layers:
        layer.self_attn.config = copy.deepcopy(model.config)
        layer.self_attn.config.sliding_window = passed
    with headinfer.attach(model) as offload:
        for layer in model.model.layers:
            layer.self_attn.config._attn_implementation = model.config._attn_implementation
        has = "no window" if masked is None else f"a window of {masked}"
        with pytest.raises(UnsupportedModelError, match=f"window of {passed} .* mask has {has}"):
            call(model, offload.new_cache(), 50)


def test_a_mask_for_other_keys_is_refused() -> None:
    model = tiny_model("mistral-sliding")
    caches = [DynamicCache(), DynamicCache(config=model.config)]
    with headinfer.attach(model):
        for cache in caches:
            call(model, cache, 50)
        # Masks are made for the first layer's keys.
        caches[1].layers[0] = caches[0].layers[0]
        with pytest.raises(UnsupportedModelError, match="attends 51 keys"):
            call(model, caches[1], 1)


def test_sequences_packed_into_one_row_are_refused() -> None:
    model = tiny_model("mistral-sliding")
    positions = torch.cat((torch.arange(20), torch.arange(30)))[None]
    wanted = model(random_tokens(1, 50), position_ids=positions).logits
    alone = model(random_tokens(1, 50), position_ids=positions, use_cache=False).logits
    assert relative_error(alone, wanted) > 0.1  # stock looks for them where there is no cache
    with headinfer.attach(model, **CHUNK):
        ours = model(random_tokens(1, 50), position_ids=positions).logits
        assert relative_error(ours, wanted) < 1e-5
        with pytest.raises(UnsupportedModelError, match="more than causal, windowed and padded"):
            model(random_tokens(1, 50), position_ids=positions, use_cache=False)


@pytest.mark.parametrize("name", ["llama3", "mistral-sliding"])
def test_a_bidirectional_mask_is_refused(name: str) -> None:
    model = tiny_model(name)
    model.config.is_causal = False
    with (
        headinfer.attach(model) as offload,
        pytest.raises(UnsupportedModelError, match="more than causal, windowed and padded"),
    ):
        call(model, offload.new_cache(), 50)


def test_windows_are_told_whatever_torchs_default_device_is() -> None:
    """On a GPU they would wait for it, which nothing may in a capture."""
    sliding = sliding_window_causal_mask_function(7)
    _edges.cache_clear()
    with torch.device("meta"):
        seen = visible(1, 7, 30, 24, sliding, None, 7)
    assert seen is not None
    assert seen.window_tokens == 7


def test_accelerate_sends_a_mask_to_where_its_layers_are() -> None:
    padded = torch.ones(2, 9)
    padded[0, :4] = 0
    given = [
        visible(3, 9, 6, 0, causal_mask_function, padded, None),
        visible(3, 9, 6, 0, sliding_window_causal_mask_function(5), None, 5),
    ]
    sent, window = send_to_device(given, torch.device("meta"))
    assert sent.padding.valid.device.type == "meta"
    assert sent.padding.padded_tokens == given[0].padding.padded_tokens == 4
    assert (sent.q_len, sent.kv_len) == (3, 9)
    assert window == given[1]
    assert given[0].padding.valid.device.type == "cpu"
