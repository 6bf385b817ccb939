"""Decode steps in one CUDA graph with the copies of tiles and the host's attention; on a GPU."""

from typing import Any

import pytest
import torch

import headinfer
from captured import generated
from headinfer.engine.ready import Form
from headinfer.engine.streaming_step import StreamingStep
from headinfer.schedule import route
from tiny_models import random_tokens, tiny_model

pytestmark = pytest.mark.gpu

PLACEMENTS: dict[str, dict[str, Any]] = {
    "streamed": {"resident_tokens": 0, "tile_heads": 1, "tile_tokens": 64, "chunk_tokens": 16},
    "host": {"resident_tokens": 0, "host_attention": 0.99, "chunk_tokens": 16},
    "both": {"resident_tokens": 30, "host_attention": 0.5, "tile_tokens": 40, "chunk_tokens": 16},
}


@pytest.fixture(autouse=True)
def _few_tokens_are_steady(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have what is streamed stay for a while though there are few tokens in a test."""
    monkeypatch.setattr(route, "STEADY_TOKENS", 64)
    monkeypatch.setattr(route, "_STEADY_FROM", 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("name", "placement"),
    [
        *(
            (name, placement)
            for name in ("llama3", "gemma3", "gpt-oss")
            for placement in PLACEMENTS
        ),
        ("gemma2", "streamed"),  # no compiled kernel of the host bounds scores
    ],
)
def test_a_graph_has_the_bits_of_launched_steps(
    name: str, placement: str, dtype: torch.dtype
) -> None:
    model = tiny_model(name, head_dim=32).to("cuda", dtype)
    outputs: list[Any] = []
    for capture in (False, True):
        options = {**PLACEMENTS[placement], "capture": capture, "fuse": "off"}
        with headinfer.attach(model, **options) as offload:
            for batch in (1, 2):
                tokens = random_tokens(batch, 170).cuda()
                cache = offload.new_cache()
                outputs.append(generated(model, tokens, cache, max_new_tokens=150))
                forms = {form for _, form in cache.state.engine.captured}
                assert (Form.STREAMED in forms) == capture
            assert offload.stats.captures <= 2 * (2 + 150 // 64 + 1)
    for eager, captured in zip(outputs[:2], outputs[2:], strict=True):
        assert torch.equal(eager.sequences, captured.sequences)
        assert torch.equal(torch.stack(eager.logits), torch.stack(captured.logits))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("count", [2, 5, 8])
@pytest.mark.parametrize("placement", ["resident", *PLACEMENTS])
def test_a_graph_has_the_bits_of_launched_passes(
    placement: str, count: int, dtype: torch.dtype
) -> None:
    """Of several tokens, some of which are taken back."""
    model = tiny_model("llama3", head_dim=32).to("cuda", dtype)
    options = {**PLACEMENTS.get(placement, {"resident_tokens": "all"}), "chunk_tokens": 128}
    best = Form.ONE_LAUNCH if placement == "resident" else Form.STREAMED
    outputs: list[list[torch.Tensor]] = []
    for capture in (False, True):
        with headinfer.attach(model, **options, capture=capture, fuse="off") as offload:
            cache, found = offload.new_cache(600), []
            model(random_tokens(1, 170).cuda(), past_key_values=cache)
            for at in range(50):
                tokens = random_tokens(1, count, seed=at).cuda()
                with cache.verifying():
                    found.append(model(tokens, past_key_values=cache).logits.clone())
                rejected = at % count
                if rejected:
                    cache.crop(-rejected)
            forms = {form for _, form in cache.state.engine.captured}
            assert (best in forms) == capture
            assert (offload.stats.captured_verifications > 25) == capture
        outputs.append(found)
    assert all(map(torch.equal, *outputs))


@pytest.mark.parametrize("fails_at", [2, 5], ids=["as it runs", "as it is captured"])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_nothing_waits_for_ever_where_a_layer_fails(
    error: type[BaseException], fails_at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("llama3", head_dim=32).to("cuda")
    original, calls = StreamingStep.attend, []

    def broken_off(*args: Any) -> None:
        calls.append(args)
        if len(calls) == fails_at:
            raise error
        original(*args)

    with headinfer.attach(model, **PLACEMENTS["host"], fuse="off") as offload:
        cache = offload.new_cache()
        model(random_tokens(1, 100).cuda(), past_key_values=cache)
        token = torch.full((1, 1), 5, device="cuda")
        model(token, past_key_values=cache)
        with monkeypatch.context() as patch:
            patch.setattr(StreamingStep, "attend", broken_off)
            if error is RuntimeError:  # which leaves the form in pieces
                model(token, past_key_values=cache)
            else:
                with pytest.raises(error):
                    model(token, past_key_values=cache)
        for _ in range(6):
            model(token, past_key_values=cache)
        torch.cuda.synchronize()
        assert offload.stats.captured_steps > 0
