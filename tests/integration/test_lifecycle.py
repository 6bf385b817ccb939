"""Attaching and detaching leave no trace, and memory is freed when its owner is gone."""

import copy
import gc
import weakref
from typing import Any

import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface, LlamaForCausalLM

import headinfer
from headinfer.attend.cpu import CpuKernel
from headinfer.attend.native.kernel import NativeKernel
from headinfer.device import elementwise
from headinfer.device.simulated import SimulatedDevice
from headinfer.errors import (
    CacheStateError,
    HeadInferError,
    MemoryPlanError,
    UnsupportedModelError,
)
from headinfer.integration.calls import cache_argument
from tiny_models import random_tokens, shared_model, tiny_model


def snapshot(model: torch.nn.Module) -> dict[str, object]:
    """What must not change: configs by identity and content, hooks, attributes, registries."""
    return {
        "configs": [id(module.__dict__.get("config")) for module in model.modules()],
        "config": copy.deepcopy(model.config.to_dict()),
        "attention": model.config._attn_implementation,
        "hooks": [
            (len(module._forward_hooks), len(module._forward_pre_hooks))
            for module in model.modules()
        ],
        "attributes": [sorted(module.__dict__) for module in model.modules()],
        "registries": (
            sorted(AttentionInterface._global_mapping),
            sorted(AttentionMaskInterface._global_mapping),
        ),
        "generation": model.generation_config.to_dict(),
    }


@pytest.mark.parametrize("name", ["llama3", "gemma3", "qwen3-next"])
def test_detach_restores_the_model_exactly(name: str) -> None:
    model = tiny_model(name)
    before = snapshot(model)
    offload = headinfer.attach(model, chunk_tokens=8)
    assert snapshot(model) != before
    model.generate(random_tokens(1, 20), past_key_values=offload.new_cache(), max_new_tokens=3)
    offload.detach()
    offload.detach()
    assert snapshot(model) == before


def test_an_exception_in_the_block_restores_the_model() -> None:
    model = tiny_model("llama3")
    before = snapshot(model)
    with pytest.raises(ZeroDivisionError), headinfer.attach(model):
        raise ZeroDivisionError
    assert snapshot(model) == before


@pytest.mark.parametrize("failing", ["layers.1.mlp", "layers.1.self_attn.o_proj"])
def test_an_exception_in_a_layer_leaves_the_attachment_usable(failing: str) -> None:
    model = tiny_model("llama3")
    tokens = random_tokens(1, 30)
    stock = model.generate(tokens, max_new_tokens=5, do_sample=False)

    def fail(*_: object) -> None:
        raise ZeroDivisionError

    with headinfer.attach(model, device="simulated", chunk_tokens=8, tile_tokens=8) as offload:
        handle = model.get_submodule(f"model.{failing}").register_forward_pre_hook(fail)
        with pytest.raises(ZeroDivisionError):
            model(tokens, past_key_values=offload.new_cache())
        handle.remove()
        ours = model.generate(
            tokens, past_key_values=offload.new_cache(), max_new_tokens=5, do_sample=False
        )
    assert torch.equal(ours, stock)


def test_two_models_sharing_a_config_do_not_meet() -> None:
    first = tiny_model("llama3")
    second = LlamaForCausalLM(first.config).eval().requires_grad_(False)
    tokens = random_tokens(1, 30)
    stock = [model(tokens).logits for model in (first, second)]
    with headinfer.attach(first, device="simulated", tile_tokens=8, chunk_tokens=7) as one:
        assert torch.equal(second(tokens).logits, stock[1])  # not attached: bit for bit its own
        with headinfer.attach(second, tile_heads=1) as two:
            caches = (one.new_cache(), two.new_cache())
            for start in range(0, 30, 10):  # in turn, a few tokens each
                part = tokens[:, start : start + 10]
                ours = [
                    model(part, past_key_values=cache).logits
                    for model, cache in zip((first, second), caches, strict=True)
                ]
                for mine, wanted in zip(ours, stock, strict=True):
                    torch.testing.assert_close(mine, wanted[:, start : start + 10])
            with pytest.raises(CacheStateError, match="another attachment"):
                first(tokens, past_key_values=caches[1])


def test_a_cache_given_to_a_model_that_is_not_attached_says_so(
    caplog: pytest.LogCaptureFixture,
) -> None:
    attached, other = tiny_model("llama3"), tiny_model("llama3", seed=1)
    tokens = random_tokens(1, 20)
    stock = attached(tokens).logits
    with headinfer.attach(attached) as offload:
        cache = offload.new_cache()
        cached = cache_argument(other, cache)
        told = r"the model that was called is not the attached one .* offload.new_cache\(\)"
        with pytest.raises(CacheStateError, match=told):
            other.generate(tokens, max_new_tokens=2, **cached)
        with pytest.raises(CacheStateError, match=told):
            other(tokens, **cached)
        assert not caplog.records  # which would be of the attached one
        with headinfer.attach(other), pytest.raises(CacheStateError, match=told):
            other.model(tokens, **cached)  # which does not ask whose cache it is
        cache.reset()
        torch.testing.assert_close(attached(tokens, **cached).logits, stock)


def test_two_caches_of_one_model_do_not_meet() -> None:
    model = shared_model("llama3")
    tokens = random_tokens(2, 30)
    stock = model(tokens).logits
    with headinfer.attach(model, device="simulated", tile_tokens=8, chunk_tokens=7) as offload:
        caches = [offload.new_cache(), offload.new_cache()]
        for start in range(0, 30, 6):
            for row, cache in enumerate(caches):
                part = tokens[row : row + 1, start : start + 6]
                ours = model(part, past_key_values=cache).logits
                torch.testing.assert_close(ours, stock[row : row + 1, start : start + 6])


def test_memory_is_freed_at_once_when_the_cache_is_dropped() -> None:
    model = shared_model("llama3")
    device = SimulatedDevice()
    with headinfer.attach(model, device="simulated", simulated_device=device) as offload:
        gc.collect()
        gc.disable()  # it must not need the garbage collector
        try:
            cache = offload.new_cache()
            model(random_tokens(1, 40), past_key_values=cache, logits_to_keep=1)
            engine = weakref.ref(cache.state.engine)
            assert device.allocated_bytes > 0
            del cache
            assert engine() is None
            assert device.allocated_bytes == 0
        finally:
            gc.enable()


def test_a_closed_cache_frees_its_memory_and_says_so() -> None:
    model = shared_model("llama3")
    device = SimulatedDevice()
    with headinfer.attach(model, device="simulated", simulated_device=device) as offload:
        cache = offload.new_cache()
        model(random_tokens(1, 40), past_key_values=cache)
        cache.close()
        cache.close()
        assert device.allocated_bytes == 0
        with pytest.raises(CacheStateError, match="closed"):
            model(random_tokens(1, 3), past_key_values=cache)
        reused = offload.new_cache()
        model(random_tokens(1, 40), past_key_values=reused)
    assert device.allocated_bytes == 0
    with pytest.raises(CacheStateError, match="detached"):
        offload.new_cache()


def test_reset_makes_the_cache_new() -> None:
    model = shared_model("llama3")
    tokens = random_tokens(1, 40)
    with headinfer.attach(model, device="simulated", tile_tokens=8, chunk_tokens=7) as offload:
        cache = offload.new_cache()
        first = model(tokens, past_key_values=cache).logits
        cache.reset()
        assert cache.get_seq_length() == 0
        assert torch.equal(model(tokens, past_key_values=cache).logits, first)


@pytest.mark.parametrize("device", ["cpu", "simulated"])
def test_a_cache_filled_in_inference_mode_goes_on_outside_it(device: str) -> None:
    model = shared_model("llama3")
    tokens = random_tokens(1, 40)
    stock = model(tokens).logits
    with headinfer.attach(model, device=device, tile_tokens=8, chunk_tokens=7) as offload:
        cache = offload.new_cache()
        with torch.inference_mode():
            model(tokens[:, :30], past_key_values=cache)
        with torch.no_grad():
            cache.reorder_cache(torch.tensor([0]))
            ours = model(tokens[:, 30:], past_key_values=cache).logits
        cache.close()
    torch.testing.assert_close(ours, stock[:, 30:])


@pytest.mark.covering
@pytest.mark.parametrize("prompt", [5, 30, 100])
@pytest.mark.parametrize("device", ["cpu", "simulated"])
def test_host_memory_is_what_was_planned(device: str, prompt: int) -> None:
    model = shared_model("llama3")
    with headinfer.attach(model, device=device, chunk_tokens=32) as offload:
        cache = offload.new_cache(max_tokens=prompt + 4)
        model.generate(random_tokens(1, prompt), past_key_values=cache, max_new_tokens=4)
        assert offload.stats.host_kv_bytes == offload.plan.kv_host_bytes(prompt + 4)


@pytest.mark.slow
def test_decoding_without_a_stated_length_grows_in_few_segments() -> None:
    model = shared_model("llama3")
    stock = model.generate(random_tokens(1, 20), max_new_tokens=600, do_sample=False)
    with headinfer.attach(model) as offload:
        cache = offload.new_cache()
        ours = model.generate(
            random_tokens(1, 20), past_key_values=cache, max_new_tokens=600, do_sample=False
        )
        assert cache.get_seq_length() == 619
        # 20 tokens reserved, then 256 at a time; a segment a token would also be a tile a token.
        assert offload.stats.host_kv_bytes == offload.plan.kv_host_bytes(20 + 3 * 256)
    assert torch.equal(ours, stock)


@pytest.mark.covering
@pytest.mark.parametrize("name", ["llama3", "gemma3", "qwen3-next"])
@pytest.mark.parametrize("device", ["cpu", "simulated"])
def test_a_call_interrupted_half_way_is_noticed(name: str, device: str) -> None:
    model = tiny_model(name)
    tokens = random_tokens(1, 30)
    stock = model(tokens).logits

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with headinfer.attach(model, device=device, chunk_tokens=8, tile_tokens=8) as offload:
        cache = offload.new_cache()
        model(tokens[:, :20], past_key_values=cache)
        handle = model.model.layers[2].register_forward_pre_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            model(tokens[:, 20:], past_key_values=cache)
        handle.remove()
        with pytest.raises(CacheStateError, match="was interrupted"):
            model(tokens[:, 20:], past_key_values=cache)
        cache.reset()
        torch.testing.assert_close(model(tokens, past_key_values=cache).logits, stock)


def test_a_kernel_that_fails_in_the_middle_costs_no_buffer() -> None:
    model = tiny_model("llama3")
    tokens = random_tokens(1, 60)
    stock = model(tokens).logits
    with headinfer.attach(model, device="simulated", chunk_tokens=8, tile_tokens=8) as offload:
        cache = offload.new_cache()
        model(tokens[:, :50], past_key_values=cache)
        right = CpuKernel.attend
        for attempt in range(5):
            calls = iter(range(100))

            def failing(self, work, calls=calls, attempt=attempt):  # type: ignore[no-untyped-def]
                if next(calls) == 2 + attempt % 2:
                    raise ZeroDivisionError
                right(self, work)

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(CpuKernel, "attend", failing)
                patch.setattr(NativeKernel, "attend", failing)
                with pytest.raises(ZeroDivisionError):
                    model(tokens[:, 50:], past_key_values=cache)
        ours = model(tokens[:, 50:], past_key_values=cache).logits  # nothing was added meanwhile
    torch.testing.assert_close(ours, stock[:, 50:])


def test_a_cache_of_a_detached_model_says_so() -> None:
    model = shared_model("llama3")
    with headinfer.attach(model) as offload:
        used, unused = offload.new_cache(), offload.new_cache()
        model(random_tokens(1, 10), past_key_values=used)
    for use in (
        used.get_seq_length,
        used.reset,
        lambda: used.crop(-1),
        lambda: model(random_tokens(1, 3), past_key_values=used),
        lambda: model(random_tokens(1, 3), past_key_values=unused),
    ):
        with pytest.raises(CacheStateError, match=r"closed|detached"):
            use()
    used.close()


def test_memory_is_freed_after_a_failed_call_too() -> None:
    model = tiny_model("llama3")
    device = SimulatedDevice()

    def fail(*_: object) -> None:
        raise ZeroDivisionError

    model.model.layers[1].mlp.register_forward_pre_hook(fail)
    with headinfer.attach(model, device="simulated", simulated_device=device) as offload:
        cache = offload.new_cache()
        with pytest.raises(ZeroDivisionError):
            model(random_tokens(1, 40), past_key_values=cache)
        del cache
        gc.collect()
        assert device.allocated_bytes == 0


def test_windows_stay_bounded_in_a_long_prompt_of_a_speculative_cache() -> None:
    model = shared_model("gemma3")
    tokens = random_tokens(1, 200)
    stock = model(tokens).logits
    with headinfer.attach(model, chunk_tokens=16) as offload:
        cache = offload.new_cache()
        cache.activate_past_recording()  # as prompt lookup leaves it
        ours = model(tokens, past_key_values=cache, logits_to_keep=1).logits
        engine = cache.state.engine
        assert 0 < engine.device_kv_bytes <= engine.plan.kv_device_bytes
    torch.testing.assert_close(ours, stock[:, -1:])


@pytest.mark.parametrize("device", ["cpu", "simulated"])
def test_the_device_new_tensors_have_by_default_does_not_matter(device: str) -> None:
    model, tokens = shared_model("llama3"), random_tokens(1, 40)
    stock = model(tokens).logits
    options = {"device": device, "chunk_tokens": 16, "tile_tokens": 16, "host_attention": 0.5}
    with headinfer.attach(model, **options) as offload, torch.device("meta"):
        cache = offload.new_cache()
        ours = [
            model(part, past_key_values=cache).logits for part in tokens.split([38, 1, 1], dim=1)
        ]
    torch.testing.assert_close(torch.cat(ours, dim=1), stock)


@pytest.mark.covering(most=1)
@pytest.mark.parametrize(
    "options", [{"device": "cpu"}, {"device": "simulated", "kv_cache": "packed"}], ids=str
)
@torch.no_grad()
def test_that_device_does_not_matter_in_16_bits_from_the_first_step_on(
    options: dict[str, Any],
) -> None:
    model, tokens = tiny_model("llama3").to(torch.bfloat16), random_tokens(2, 140)
    sizes = {"chunk_tokens": 64, "tile_tokens": 64, "resident_tokens": 0, "host_attention": 0.5}
    logits = []
    for default in ("meta", "cpu"):  # what is found out in a process is found out by the first
        elementwise._lanes.cache_clear()
        elementwise._table.cache_clear()
        with headinfer.attach(model, **options, **sizes) as offload, torch.device(default):
            cache = offload.new_cache()
            for part in tokens.split([136, 1, 1, 1, 1], dim=1):
                cache.batch_select_indices([1, 0])
                logits.append(model(part, **cache_argument(model, cache)).logits[:, -1])
            cache.batch_repeat_interleave(2)
            assert cache.get_seq_length() == 140
    assert torch.equal(torch.stack(logits[:5]), torch.stack(logits[5:]))


def test_growing_the_rows_is_refused_where_host_memory_is_too_small() -> None:
    model = shared_model("llama3")
    with headinfer.attach(model, host_memory="100KiB") as offload:
        cache = offload.new_cache()
        model(random_tokens(1, 40), past_key_values=cache)
        with pytest.raises(MemoryPlanError, match="needs 180"):
            cache.batch_repeat_interleave(4)
        assert cache.get_seq_length() == 40


def test_a_model_is_not_attached_twice() -> None:
    model = tiny_model("llama3")
    with headinfer.attach(model), pytest.raises(UnsupportedModelError, match="attached already"):
        headinfer.attach(model)


def test_a_cache_keeps_its_number_of_rows() -> None:
    model = shared_model("llama3")
    with headinfer.attach(model) as offload:
        cache = offload.new_cache()
        model(random_tokens(2, 10), past_key_values=cache)
        with pytest.raises(CacheStateError, match="holds 2 rows and was given 1"):
            model(random_tokens(1, 10), past_key_values=cache)


@pytest.mark.parametrize("learning", ["", "q_proj", "k_proj", "v_proj"])
def test_gradients_are_refused(learning: str) -> None:
    model = tiny_model("llama3")
    for name, weight in model.named_parameters():
        weight.requires_grad_(learning in name)
    with headinfer.attach(model), pytest.raises(HeadInferError, match="gradients are on"):
        model(random_tokens(1, 10))
