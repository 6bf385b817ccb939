"""Under `torch.autocast` results are as near to float32's as those of stock attention are."""

import pytest
import torch

import headinfer
from headinfer.errors import CacheStateError, UnsupportedModelError
from headinfer.integration.calls import cache_argument
from tiny_models import random_tokens, shared_model, tiny_model

BFLOAT16 = {"device_type": "cpu", "dtype": torch.bfloat16}


def distance(logits: torch.Tensor, exact: torch.Tensor) -> float:
    return float((logits.float() - exact).norm() / exact.norm())


@pytest.mark.covering
@pytest.mark.parametrize("name", ["llama3", "gemma3", "gemma2", "gpt-oss", "qwen3-next"])
@pytest.mark.parametrize("device", ["cpu", "simulated"])
def test_autocast_is_as_exact_as_stock(name: str, device: str) -> None:
    model = shared_model(name)
    tokens = random_tokens(2, 60)
    mask = torch.ones(2, 60, dtype=torch.long)
    mask[0, :9] = 0
    exact = model(tokens, attention_mask=mask).logits
    with torch.autocast(**BFLOAT16):
        stock = model(tokens, attention_mask=mask).logits
    parts = []
    with headinfer.attach(model, device=device, tile_tokens=8, chunk_tokens=16) as offload:
        cache = offload.new_cache()
        for start, end in ((0, 40), (40, 41), (41, 60)):
            with torch.autocast(**BFLOAT16):
                parts.append(
                    model(
                        tokens[:, start:end],
                        attention_mask=mask[:, :end],
                        **cache_argument(model, cache),
                    ).logits
                )
    ours = torch.cat(parts, dim=1)
    assert ours.dtype == stock.dtype
    visible = mask.bool()
    wanted = distance(stock[visible], exact[visible])
    assert wanted > 0
    assert distance(ours[visible], exact[visible]) < 1.25 * wanted + 1e-3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_generating_under_autocast_gives_the_tokens_of_stock(dtype: torch.dtype) -> None:
    model = shared_model("llama3")
    tokens = random_tokens(1, 40)
    with torch.autocast("cpu", dtype=dtype):
        stock = model.generate(tokens, max_new_tokens=8, do_sample=False)
        with headinfer.attach(model, chunk_tokens=16) as offload:
            cache = offload.new_cache(max_tokens=47)
            ours = model.generate(
                tokens, max_new_tokens=8, do_sample=False, **cache_argument(model, cache)
            )
            assert cache.state.engine.dtype is dtype
            held = offload.stats.host_kv_bytes
    assert torch.equal(ours, stock)
    assert held == 47 * 3 * 4 * (16 + 16) * 2  # layers x heads x dims x 2 bytes: as planned


def test_a_cache_of_a_16_bit_model_may_enter_and_leave_autocast() -> None:
    model = tiny_model("llama3").to(torch.bfloat16)
    tokens = random_tokens(1, 30)
    stock = model(tokens).logits
    with headinfer.attach(model, device="simulated") as offload:
        cache = offload.new_cache()
        parts = [model(tokens[:, :10], **cache_argument(model, cache)).logits]
        with torch.autocast(**BFLOAT16):
            parts.append(model(tokens[:, 10:20], **cache_argument(model, cache)).logits)
        parts.append(model(tokens[:, 20:], **cache_argument(model, cache)).logits)
    torch.testing.assert_close(torch.cat(parts, dim=1), stock, atol=0.05, rtol=0.05)


@pytest.mark.parametrize("device", ["cpu", "simulated"])
def test_a_cache_goes_on_only_under_the_autocast_it_was_begun_under(device: str) -> None:
    model = shared_model("llama3")
    tokens = random_tokens(1, 30)
    with headinfer.attach(model, device=device, chunk_tokens=16) as offload:
        cache = offload.new_cache()
        with torch.autocast(**BFLOAT16):
            first = model(tokens[:, :20], **cache_argument(model, cache)).logits
        with pytest.raises(CacheStateError, match=r"begun in .* the same torch\.autocast"):
            model(tokens[:, 20:], **cache_argument(model, cache))
        with torch.autocast(**BFLOAT16):  # nothing was lost
            model(tokens[:, 20:], **cache_argument(model, cache))
        cache.reset()
        ours = model(tokens, **cache_argument(model, cache)).logits
        torch.testing.assert_close(ours, model(tokens).logits)
        with (
            torch.autocast(**BFLOAT16),
            pytest.raises(CacheStateError, match="begun in"),
        ):
            model(tokens[:, :1], **cache_argument(model, cache))
    assert first.dtype is torch.bfloat16


def test_a_cache_of_the_stock_kind_works_under_autocast() -> None:
    model = shared_model("llama3")
    tokens = random_tokens(1, 30)
    with torch.autocast(**BFLOAT16):
        stock = model(tokens).logits
        with headinfer.attach(model):
            ours = model(tokens).logits
    torch.testing.assert_close(ours, stock, atol=0.1, rtol=0.1)


def test_keys_of_another_dtype_than_the_models_are_kept_as_they_are() -> None:
    """The embedding alone is of 64 bits, and tells the model's dtype; the layers are of 32."""
    model = tiny_model("llama3")
    tokens = random_tokens(1, 30)
    stock = model(tokens).logits
    model.model.embed_tokens.to(torch.float64)
    model.model.embed_tokens.register_forward_hook(lambda _m, _a, output: output.float())
    assert model.dtype is torch.float64
    with headinfer.attach(model, device="simulated", chunk_tokens=8) as offload:
        cache = offload.new_cache()
        parts = [
            model(tokens[:, start : start + 10], **cache_argument(model, cache)).logits
            for start in (0, 10, 20)
        ]
        assert cache.state.engine.dtype is torch.float32
    torch.testing.assert_close(torch.cat(parts, dim=1), stock)


def test_keys_and_values_of_two_dtypes_are_refused() -> None:
    model = tiny_model("llama3")
    for layer in model.model.layers:
        layer.self_attn.v_proj.register_forward_hook(lambda _m, _a, output: output.half())
    with (
        headinfer.attach(model) as offload,
        pytest.raises(UnsupportedModelError, match="one dtype"),
    ):
        model(random_tokens(1, 10), **cache_argument(model, offload.new_cache()))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("host_attention", [0.5, "off"])
def test_autocast_on_a_gpu(dtype: torch.dtype, host_attention: float | str) -> None:
    model = tiny_model("llama3").cuda()
    tokens = random_tokens(2, 300).cuda()
    exact = model(tokens).logits
    with torch.autocast("cuda", dtype=dtype):
        stock = model(tokens).logits
        with headinfer.attach(
            model,
            chunk_tokens=64,
            tile_tokens=32,
            resident_tokens=50,
            host_attention=host_attention,
        ) as offload:
            cache = offload.new_cache()
            parts = [model(tokens[:, :290], **cache_argument(model, cache)).logits]
            for start in range(290, 300):
                part = tokens[:, start : start + 1]
                parts.append(model(part, **cache_argument(model, cache)).logits)
    ours = torch.cat(parts, dim=1)
    assert distance(ours, exact) < 1.25 * distance(stock, exact) + 1e-3
