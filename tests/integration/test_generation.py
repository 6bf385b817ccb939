"""Everything `generate` offers gives stock's very tokens."""

import gc
import weakref
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import DynamicCache, PreTrainedModel, StoppingCriteria, TextStreamer

import headinfer
from headinfer.device.simulated import SimulatedDevice
from headinfer.integration.calls import CACHE_NAMES, cache_name
from tiny_models import random_tokens, shared_model, tiny_model

DEVICES = ["cpu", "simulated"]
SMALL = {"tile_heads": 1, "tile_tokens": 16, "chunk_tokens": 11}

MODES: dict[str, dict[str, Any]] = {
    "sampling": {"do_sample": True, "top_k": 20, "temperature": 0.9},
    "beams": {"num_beams": 3, "do_sample": False},
    "beams-returned": {"num_beams": 4, "num_return_sequences": 2, "do_sample": False},
    "returned": {"do_sample": True, "num_return_sequences": 3},
    "prompt-lookup": {"prompt_lookup_num_tokens": 5, "do_sample": False},
    "chunked-by-user": {"prefill_chunk_size": 7, "do_sample": False},
}


def generate(model: PreTrainedModel, tokens: torch.Tensor, **options: Any) -> torch.Tensor:
    torch.manual_seed(5)
    return model.generate(tokens, max_new_tokens=24, pad_token_id=0, **options)


def repeating_tokens() -> torch.Tensor:
    """A prompt that repeats itself, so that lookups find candidates."""
    return random_tokens(1, 9).repeat(1, 5)


@pytest.mark.covering(most=5)
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["llama3", "gemma3"])
def test_mode_gives_stock_tokens(name: str, mode: str, device: str) -> None:
    model = shared_model(name)
    tokens, options = repeating_tokens(), MODES[mode]
    stock = generate(model, tokens, past_key_values=DynamicCache(config=model.config), **options)
    with headinfer.attach(model, device=device, **SMALL) as offload:
        ours = generate(model, tokens, past_key_values=offload.new_cache(), **options)
    assert torch.equal(ours, stock)


@pytest.mark.covering(most=1)
@pytest.mark.parametrize("device", DEVICES)
def test_assisted_decoding_crops_the_cache(device: str) -> None:
    model, assistant = shared_model("llama3"), tiny_model("llama3", seed=3)
    tokens = random_tokens(1, 45)
    stock = generate(model, tokens, assistant_model=assistant, do_sample=False)
    with headinfer.attach(model, device=device, **SMALL) as offload:
        cache = offload.new_cache()
        ours = generate(
            model, tokens, assistant_model=assistant, do_sample=False, past_key_values=cache
        )
    assert torch.equal(ours, stock)


@pytest.mark.covering(most=2)
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["llama3", "gpt-oss", "qwen3-next"])
def test_next_turn_goes_on_with_the_cache(name: str, device: str) -> None:
    model = shared_model(name)
    turns = [random_tokens(1, length, seed=length) for length in (37, 1, 29)]

    def converse(cache: Any) -> torch.Tensor:
        tokens = torch.empty(1, 0, dtype=torch.long)
        for turn in turns:
            tokens = torch.cat((tokens, turn), dim=1)
            tokens = generate(model, tokens, past_key_values=cache, do_sample=False)
        return tokens

    stock = converse(DynamicCache(config=model.config))
    with headinfer.attach(model, device=device, **SMALL) as offload:
        assert torch.equal(converse(offload.new_cache()), stock)


def test_streamer_and_stopping_criteria_see_every_token() -> None:
    model = shared_model("llama3")
    tokens = random_tokens(1, 30)

    class Recorder(TextStreamer):
        def __init__(self) -> None:
            self.seen: list[int] = []

        def put(self, value: torch.Tensor) -> None:
            self.seen.extend(value.flatten().tolist())

        def end(self) -> None:
            self.seen.append(-1)

    class StopAfter(StoppingCriteria):
        def __call__(self, input_ids: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
            return torch.full((input_ids.shape[0],), input_ids.shape[1] >= 40)

    recorder = Recorder()
    with headinfer.attach(model, **SMALL) as offload:
        result = generate(
            model,
            tokens,
            do_sample=False,
            past_key_values=offload.new_cache(),
            streamer=recorder,
            stopping_criteria=[StopAfter()],
        )
    assert result.shape[1] == 40
    assert recorder.seen == [*result[0].tolist(), -1]


def test_a_cache_is_made_when_none_is_passed_to_the_model() -> None:
    model = shared_model("llama3")
    tokens = random_tokens(1, 30)
    stock = model(tokens)
    with headinfer.attach(model, **SMALL) as offload:
        first = model(tokens[:, :20])
        second = model(tokens[:, 20:], past_key_values=first.past_key_values)
        assert offload.stats.host_kv_bytes > 0
    torch.testing.assert_close(second.logits, stock.logits[:, 20:])


@pytest.mark.parametrize("name", ["llama3", "gemma3"])
def test_a_stock_cache_still_works_on_the_device(name: str) -> None:
    model = shared_model(name)
    tokens = random_tokens(1, 50)
    stock = generate(model, tokens, do_sample=False)
    with headinfer.attach(model, **SMALL) as offload:
        ours = generate(model, tokens, do_sample=False)
        assert offload.stats.host_kv_bytes == 0
    assert torch.equal(ours, stock)


def test_long_prompts_are_chunked_and_only_the_last_logits_computed() -> None:
    model = shared_model("llama3")
    lengths: list[tuple[int, int]] = []
    handle = model.lm_head.register_forward_hook(
        lambda _module, inputs, _output: lengths.append(tuple(inputs[0].shape[:2]))
    )
    done: list[tuple[int, int]] = []
    try:
        with headinfer.attach(
            model, chunk_tokens=16, progress=lambda *tokens: done.append(tokens)
        ) as offload:
            model.generate(
                random_tokens(1, 50), past_key_values=offload.new_cache(), max_new_tokens=2
            )
    finally:
        handle.remove()
    assert lengths == [(1, 1)] * 5  # four chunks and one decode step
    assert done == [(16, 50), (32, 50), (48, 50), (50, 50)]


@pytest.mark.parametrize("name", CACHE_NAMES)
def test_a_cache_may_be_passed_by_each_name_that_transformers_has_for_it(name: str) -> None:
    model = shared_model("llama3")
    if name == "cache" != cache_name(model):
        pytest.skip("this transformers calls a cache past_key_values alone")
    tokens = random_tokens(1, 50)
    stock = generate(model, tokens, do_sample=False)
    with headinfer.attach(model, **SMALL) as offload:
        ours = generate(model, tokens, do_sample=False, **{name: offload.new_cache()})
        assert offload.stats.prefill_tokens == 50
        cache = offload.new_cache()
        with torch.no_grad():
            model(tokens, **{name: cache})
            assert cache.get_seq_length() == 50
            (other,) = set(CACHE_NAMES) - {name}
            model(tokens[:, :3], **{name: cache, other: None})
        assert cache.get_seq_length() == 53
        assert torch.equal(ours, stock)


class LateDevice(SimulatedDevice):
    """Its marks are reached by nothing but waiting, which is noted."""

    def __init__(self, noted: list[Any]) -> None:
        super().__init__()
        self._noted = noted

    def mark_compute(self) -> SimpleNamespace:
        return SimpleNamespace(reached=False, wait=lambda: self._noted.append("waited"))


def test_a_chunk_is_begun_before_the_one_before_it_is_done() -> None:
    model, seen = shared_model("llama3"), []
    handle = model.model.embed_tokens.register_forward_pre_hook(lambda *_: seen.append("chunk"))
    try:
        with headinfer.attach(
            model,
            chunk_tokens=16,
            device="simulated",
            simulated_device=LateDevice(seen),
            progress=lambda *tokens: seen.append(tokens),
        ) as offload:
            model(random_tokens(1, 40), past_key_values=offload.new_cache())
    finally:
        handle.remove()
    assert seen == [
        *("chunk", "chunk", "waited", (16, 40)),
        *("chunk", "waited", (32, 40), (40, 40)),
    ]


def test_progress_that_fails_leaves_nothing_of_the_call() -> None:
    def fail_at_the_last(done_tokens: int, _all_tokens: int) -> None:
        if done_tokens > 16:
            raise KeyError(done_tokens)

    model, logits = shared_model("llama3"), []
    handle = model.lm_head.register_forward_hook(
        lambda _module, _inputs, output: logits.append(weakref.ref(output))
    )
    try:
        with headinfer.attach(
            model,
            chunk_tokens=16,
            device="simulated",
            simulated_device=LateDevice([]),
            progress=fail_at_the_last,
        ) as offload:
            with pytest.raises(KeyError, match="32"):
                model(random_tokens(1, 40), past_key_values=offload.new_cache())
            gc.collect()
            assert [ref() for ref in logits] == [None] * 3
    finally:
        handle.remove()


@pytest.mark.parametrize("device", DEVICES)
def test_rows_can_be_repeated_and_selected(device: str) -> None:
    model = shared_model("llama3")
    tokens = random_tokens(2, 40)

    def run(cache: Any) -> torch.Tensor:
        model(tokens, past_key_values=cache)
        cache.batch_repeat_interleave(2)
        model(random_tokens(4, 3), past_key_values=cache)
        cache.batch_select_indices(torch.tensor([3, 0, 2]))
        model(random_tokens(3, 9), past_key_values=cache)
        cache.reorder_cache(torch.tensor([1, 1, 0]))
        return model(random_tokens(3, 2), past_key_values=cache).logits

    stock = run(DynamicCache(config=model.config))
    with headinfer.attach(model, device=device, **SMALL) as offload:
        torch.testing.assert_close(run(offload.new_cache()), stock)


def test_short_prompts_and_rejected_drafts_are_not_counted_as_decoded() -> None:
    model, cache_argument = shared_model("llama3"), {}
    tokens = random_tokens(1, 40)
    with headinfer.attach(model, **SMALL) as offload:
        stats, cache = offload.stats, offload.new_cache()
        cache_argument[cache_name(model)] = cache
        first = model.generate(tokens, max_new_tokens=5, do_sample=False, **cache_argument)
        assert (stats.prefill_tokens, stats.decode_tokens, stats.decode_steps) == (40, 4, 4)
        second = torch.cat((first, random_tokens(1, 20, seed=7)), dim=1)
        model.generate(second, max_new_tokens=5, do_sample=False, **cache_argument)
        assert (stats.prefill_tokens, stats.decode_tokens, stats.decode_steps) == (61, 8, 8)
    repeated = random_tokens(1, 9).repeat(1, 5)
    with headinfer.attach(model, **SMALL) as offload:
        stats, cache = offload.stats, offload.new_cache()
        cache_argument[cache_name(model)] = cache
        output = model.generate(
            repeated,
            max_new_tokens=20,
            do_sample=False,
            prompt_lookup_num_tokens=4,
            **cache_argument,
        )
        assert stats.decode_tokens == cache.stats.decode_tokens
        assert stats.decode_tokens == cache.get_seq_length() - repeated.shape[1]
        assert 0 <= output.shape[1] - 1 - repeated.shape[1] - stats.decode_tokens <= 1
