"""The device's share of the KV cache does not grow with the context."""

import pytest
import torch

import headinfer
from headinfer.device.simulated import SimulatedDevice
from tiny_models import random_tokens, tiny_model


def peak_device_bytes(
    context_tokens: int, *, overlap: bool = True, chunk_tokens: int = 4096
) -> tuple[int, int]:
    """Return the peak of allocated KV bytes, and the plan's, for one prompt and some decoding."""
    model = tiny_model(
        "llama3",
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=2**17,
    )
    device = SimulatedDevice()
    with headinfer.attach(
        model,
        device="simulated",
        simulated_device=device,
        chunk_tokens=chunk_tokens,
        tile_heads=1,
        tile_tokens=chunk_tokens - 96,
        overlap=overlap,
    ) as offload:
        cache = offload.new_cache()
        model(random_tokens(1, context_tokens), past_key_values=cache, logits_to_keep=1)
        for _ in range(3):
            model(random_tokens(1, 1), past_key_values=cache)
        planned = cache.state.engine.plan.kv_device_bytes
        assert offload.stats.standard_kv_bytes == (context_tokens + 3) * 2 * 2 * 8 * 4
        assert offload.stats.peak_device_kv_bytes == planned
    return device.peak_bytes, planned


@pytest.mark.parametrize(
    ("chunk_tokens", "overlap"),
    [
        (2048, True),
        pytest.param(4096, True, marks=pytest.mark.slow),
        pytest.param(4096, False, marks=pytest.mark.slow),
    ],
)
def test_peak_is_the_same_at_2_and_at_16_chunks(chunk_tokens: int, overlap: bool) -> None:
    short = peak_device_bytes(2 * chunk_tokens, overlap=overlap, chunk_tokens=chunk_tokens)
    long = peak_device_bytes(16 * chunk_tokens, overlap=overlap, chunk_tokens=chunk_tokens)
    assert short == long
    peak, planned = long
    assert peak <= planned
    assert planned < 16 * chunk_tokens * 2 * 2 * 8 * 4 / 4  # far below the whole cache


def requested_bytes(which: str) -> int:
    """Return what was asked of torch's allocator, "current" or "peak".

    What it allocates for that depends on the blocks it finds: up to 1 MiB more for each tensor.
    """
    return torch.cuda.memory_stats()[f"requested_bytes.all.{which}"]


@pytest.mark.gpu
def test_cuda_peak_is_the_same_at_32k_and_128k_tokens() -> None:
    """At 32K a chunk already has more partials than are merged at once."""
    model = tiny_model("llama3", num_hidden_layers=2, max_position_embeddings=2**17)
    model.to("cuda", torch.bfloat16)
    peaks = []
    for context_tokens in (2**15, 2**15, 2**17):  # the first also makes cuBLAS's workspaces
        with headinfer.attach(
            model, chunk_tokens="4K", tile_heads=1, tile_tokens=4096, resident_tokens=0
        ) as offload:
            cache = offload.new_cache()
            tokens = random_tokens(1, context_tokens).cuda()
            torch.cuda.reset_peak_memory_stats()
            before = requested_bytes("current")
            model(tokens, past_key_values=cache, logits_to_keep=1)
            peaks.append(requested_bytes("peak") - before)
            cache.close()
    assert peaks[2] <= peaks[1] * 1.02
