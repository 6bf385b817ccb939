"""A cache whose tokens are rounded to 8 bits in host memory: near the stock cache, and labelled."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache

import headinfer
from headinfer.device.simulated import SimulatedDevice
from headinfer.engine.ready import Form
from headinfer.errors import OptionError
from headinfer.plan.format import Format
from headinfer.saved.folder import read_index
from headinfer.schedule import route
from tiny_models import random_tokens, tiny_model

SIZES: dict[str, Any] = {"tile_heads": 1, "tile_tokens": 40, "chunk_tokens": 50}
WAYS: dict[str, dict[str, Any]] = {
    "overlapped": {"capture": False},
    "with host attention": {"host_attention": 0.4, "resident_tokens": 30},
    "sequential": {"overlap": False, "capture": False},
    "streamed in one launch": {},
    "in several pieces of memory, with drafts": {"pieces": True, "draft_tokens": 30},
}
FEW = [("overlapped", "int8", torch.bfloat16), ("with host attention", "fp8", torch.float16)]
MANY = [
    (way, kv_cache, dtype)
    for way in WAYS
    for kv_cache in ("int8", "fp8")
    for dtype in (torch.bfloat16, torch.float32)
]


@pytest.fixture(autouse=True)
def _few_tokens_are_steady(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have steps that stream captured in one launch, with as few tokens as there are here."""
    monkeypatch.setattr(route, "STEADY_TOKENS", 24)
    monkeypatch.setattr(route, "_STEADY_FROM", 0)


def use(model: Any, cache: Any) -> list[torch.Tensor]:
    """Go through all that moves tokens; return the logits."""
    prompt = random_tokens(2, 131)
    outputs = [model(prompt, past_key_values=cache, logits_to_keep=1).logits]
    for step in range(27):  # a page of 25 tokens goes home
        outputs.append(model(prompt[:, step : step + 1], past_key_values=cache).logits)
    cache.crop(-70)
    outputs.append(model(prompt[:, :9], past_key_values=cache).logits)
    cache.reorder_cache(torch.tensor([1, 0]))
    copied = copy.deepcopy(cache)
    outputs.append(model(prompt[:, :60], past_key_values=cache).logits)
    outputs.append(model(prompt[:, :3], past_key_values=copied).logits)
    return outputs


@pytest.mark.covering(most=1)
@pytest.mark.parametrize(
    ("way", "kv_cache", "dtype"),
    [*FEW, *(pytest.param(*each, marks=pytest.mark.slow) for each in MANY if each not in FEW)],
)
@torch.no_grad()
def test_logits_are_near_the_stock_caches(way: str, kv_cache: str, dtype: torch.dtype) -> None:
    model = tiny_model("llama3", num_hidden_layers=2, num_key_value_heads=2, num_attention_heads=2)
    model = model.to(dtype)
    wanted = use(model, DynamicCache(config=model.config))
    options = {"resident_tokens": 0, "host_attention": "off", **SIZES, **WAYS[way]}
    device = SimulatedDevice(seed=1, host_piece_bytes=2**13 if options.pop("pieces", 0) else None)
    with headinfer.attach(
        model, device="simulated", simulated_device=device, kv_cache=kv_cache, **options
    ) as offload:
        assert offload.plan.shape.host_format is Format(kv_cache)
        assert f"rounded to 8 bits ({kv_cache})" in str(offload.plan)
        cache = offload.new_cache()
        got = use(model, cache)
        if way == "streamed in one launch":
            assert Form.STREAMED in {form for _, form in cache.state.engine.captured}
    apart = max(float((one - two).abs().max()) for one, two in zip(got, wanted, strict=True))
    scale = max(float(one.abs().max()) for one in wanted)
    rounding = 0.01 if kv_cache == "int8" else 0.05
    assert 0 < apart < scale * (rounding + 4 * torch.finfo(dtype).eps)


def test_nothing_is_rounded_on_the_cpu(caplog: pytest.LogCaptureFixture) -> None:
    with headinfer.attach(tiny_model("llama3"), device="cpu", kv_cache="int8") as offload:
        assert offload.plan.approximation == ""
    assert "kv_cache=int8 has no effect on the CPU" in caplog.text


def test_other_names_are_refused() -> None:
    with pytest.raises(OptionError, match="kv_cache must be one of auto, dense, packed, int8, fp8"):
        headinfer.attach(tiny_model("llama3"), kv_cache="int4")


def test_a_session_says_that_its_tokens_were_rounded(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Also where an exact cache goes on with it and is saved again; no folder serves it by ids."""
    model, prompt = tiny_model("llama3", num_hidden_layers=1).bfloat16(), random_tokens(1, 200)
    options = {"device": "simulated", "chunk_tokens": 64, "resident_tokens": 0}
    for kv_cache, path in (("dense", "exact"), ("int8", "rounded")):
        with headinfer.attach(model, kv_cache=kv_cache, **options) as offload:
            cache = offload.new_cache(300)
            model(prompt, past_key_values=cache)
            cache.save(tmp_path / path)
    with headinfer.attach(model, kv_cache="dense", **options) as offload:
        assert not caplog.records
        cache = copy.deepcopy(offload.load_cache(tmp_path / "rounded", max_tokens=300))
        assert "rounded' has keys and values that were rounded to 8 bits (int8)" in caplog.text
        cache.save(tmp_path / "again")
        cache.reset()
        model(prompt, past_key_values=cache)
        cache.save(tmp_path / "anew")
    found = {path.name: read_index(path).rounded for path in tmp_path.iterdir()}
    assert found == {"exact": None, "rounded": "int8", "again": "int8", "anew": None}
