"""A cache whose tokens are packed in host memory gives the bits of one whose tokens are dense."""

import copy
import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import headinfer
from headinfer.device.simulated import SimulatedDevice
from headinfer.engine.ready import Form
from headinfer.schedule import route
from tiny_models import random_tokens, tiny_model

STREAMING: dict[str, Any] = {
    "sparsity": 0.5,
    "head_pattern": "random",
    "sink_tokens": 3,
    "recent_tokens": 7,
}
SIZES: dict[str, Any] = {"tile_heads": 1, "tile_tokens": 40, "chunk_tokens": 50}
WAYS: dict[str, dict[str, Any]] = {
    "sequential": {"overlap": False, "capture": False},
    "overlapped": {"capture": False, "resident_tokens": 30},
    "streamed in one launch": {},
    "with host attention": {"host_attention": 0.4, "resident_tokens": 30},
    "in several pieces of memory": {"pieces": True, "draft_tokens": 30},
    "streaming heads": STREAMING,
    "two devices": {"devices": 2, "host_attention": 0.3},
}
_SLOW = pytest.mark.slow


@pytest.fixture(autouse=True)
def _few_tokens_are_steady(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have steps that stream captured in one launch, with as few tokens as there are here."""
    monkeypatch.setattr(route, "STEADY_TOKENS", 24)
    monkeypatch.setattr(route, "_STEADY_FROM", 0)


@functools.cache
def small_model(dtype: torch.dtype = torch.bfloat16) -> PreTrainedModel:
    model = tiny_model("llama3", num_hidden_layers=2, num_key_value_heads=2, num_attention_heads=2)
    return model.to(dtype)


def attached(kv_cache: str, model: PreTrainedModel, options: dict[str, Any]) -> headinfer.Offload:
    options = {"resident_tokens": 0, "host_attention": "off", **SIZES, **options}
    count, piece_bytes = options.pop("devices", 1), 2**13 if options.pop("pieces", False) else None
    devices = [SimulatedDevice(seed=at, host_piece_bytes=piece_bytes) for at in range(count)]
    one = devices[0] if count == 1 else devices
    return headinfer.attach(
        model, device="simulated", simulated_device=one, kv_cache=kv_cache, **options
    )


def use(
    offload: headinfer.Offload, model: PreTrainedModel, *, whole: bool
) -> tuple[list[torch.Tensor], set[Form]]:
    """Go through all that moves tokens; return what comes of it, and the forms of captures.

    Where the cache is not `whole` some heads stream, so that it cannot be read or cropped.
    """
    prompt = random_tokens(2, 171)
    cache = offload.new_cache(max_tokens=400)  # or pieces of dense memory end elsewhere, and tiles
    outputs = [model(prompt, past_key_values=cache, logits_to_keep=1).logits]
    for step in range(40):  # a page of 25 tokens goes home
        token = prompt[:, step : step + 1]
        outputs.append(model(token, past_key_values=cache).logits)
    forms = {form for _, form in cache.state.engine.captured}
    if whole:
        outputs += [cache.layers[0].keys, cache.layers[1].values]
        cache.crop(-70)
        outputs.append(model(prompt[:, :9], past_key_values=cache).logits)
    cache.reorder_cache(torch.tensor([1, 0]))
    copied = copy.deepcopy(cache)
    outputs.append(model(prompt[:, :60], past_key_values=cache).logits)
    outputs.append(model(prompt[:, :3], past_key_values=copied).logits)
    copied.batch_select_indices(torch.tensor([1]))
    outputs.append(model(prompt[:1, :70], past_key_values=copied).logits)
    return outputs, forms


@pytest.mark.parametrize(
    "way",
    [pytest.param(way, marks=[] if way == "with host attention" else _SLOW) for way in WAYS],
)
def test_packed_tokens_give_the_bits_of_dense_ones(way: str) -> None:
    model, outcomes = small_model(), []
    for kv_cache in ("dense", "packed"):
        with attached(kv_cache, model, WAYS[way]) as offload:
            outputs, forms = use(offload, model, whole=way != "streaming heads")
            assert offload.plan.shape.packs == (kv_cache == "packed")
            outcomes.append(outputs)
            if way in ("streamed in one launch", "with host attention"):
                # In pieces, too, until the prompt's last page is full: a tail goes home for it.
                in_pieces = {Form.IN_PIECES} if kv_cache == "packed" else set()
                assert forms - in_pieces == {Form.STREAMED}
    dense, packed = outcomes
    # Rows that were selected lie in other pieces of memory where they are dense, and so do tiles.
    torch.testing.assert_close(packed.pop(), dense.pop(), atol=2**-7, rtol=2**-7)
    assert all(map(torch.equal, dense, packed))


def test_generation_is_that_of_stock() -> None:
    model, prompt = small_model(), random_tokens(1, 171)
    mask = torch.ones_like(prompt)
    stock = model.generate(prompt, attention_mask=mask, max_new_tokens=8, do_sample=False)
    with attached("packed", model, {"chunk_tokens": 200}) as offload:
        cache = offload.new_cache()
        ours = model.generate(
            prompt,
            attention_mask=mask,
            max_new_tokens=8,
            do_sample=False,
            **cache.as_keyword(),
        )
        # 171 of the tokens are at home, and the others in a page on the device.
        assert offload.stats.bytes_to_host == offload.plan.shape.host_kv_bytes(171)
    assert torch.equal(ours, stock)


def test_sessions_go_on_under_the_other_form(tmp_path: Path) -> None:
    model, prompt = small_model(), random_tokens(1, 180)
    wanted = []
    for kv_cache in ("packed", "dense"):
        with attached(kv_cache, model, {}) as offload:
            cache = offload.new_cache(200)
            model(prompt[:, :171], past_key_values=cache)
            cache.save(tmp_path / kv_cache)
            wanted.append(model(prompt[:, 171:], past_key_values=cache).logits)
    assert torch.equal(*wanted)
    for kv_cache, saved in (("packed", "dense"), ("dense", "packed")):
        with attached(kv_cache, model, {}) as offload:
            cache = offload.load_cache(tmp_path / saved, max_tokens=200)
            ours = model(prompt[:, 171:], past_key_values=cache).logits
        assert torch.equal(ours, wanted[0])


def test_what_cannot_be_packed_stays_dense_and_is_named(caplog: pytest.LogCaptureFixture) -> None:
    narrow = tiny_model("llama3", head_dim=8, num_hidden_layers=1).bfloat16()
    windows = tiny_model("mistral-sliding", num_hidden_layers=1).bfloat16()
    for model, options, reason in (
        (small_model(), {"device": "cpu"}, "on the CPU, which attends"),
        (small_model(torch.float32), {"device": "simulated"}, "on float32: only bfloat16"),
        (narrow, {"device": "simulated"}, "on this model: no layer has keys and values"),
        (windows, {"device": "simulated"}, "on this model: no layer keeps tokens in CPU memory"),
    ):
        caplog.clear()
        with headinfer.attach(model, kv_cache="packed", **options) as offload:
            assert not offload.plan.shape.packs
        (record,) = caplog.records
        assert record.getMessage().startswith(f"kv_cache=packed has no effect {reason}")
