"""A cache whose form in host memory is open: packed where that pays, and dense elsewhere."""

import copy
import functools
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import headinfer
from headinfer.device.simulated import SimulatedDevice
from headinfer.errors import OptionError
from headinfer.integration import host_format
from headinfer.integration.cache import OffloadedCache
from headinfer.plan.format import Format
from tiny_models import random_tokens, tiny_model

SIZES: dict[str, Any] = {"tile_heads": 1, "tile_tokens": 64, "chunk_tokens": 64}


@functools.cache
def small_model(dtype: torch.dtype = torch.bfloat16) -> PreTrainedModel:
    return tiny_model("llama3", num_hidden_layers=2).to(dtype)


def attached(model: PreTrainedModel, *, gpus: int = 1, fast: bool = True, **options: Any) -> Any:
    devices = [SimulatedDevice(seed=at, packs_fast=fast) for at in range(gpus)]
    one: Any = devices[0] if gpus == 1 else devices
    options = {"resident_tokens": 0, "host_attention": "off", **SIZES, **options}
    return headinfer.attach(model, device="simulated", simulated_device=one, **options)


def form_of(cache: OffloadedCache) -> Format:
    assert cache.state.engine is not None
    return cache.state.engine.plan.shape.host_format


def passed(offload: headinfer.Offload, model: PreTrainedModel, tokens: int = 150) -> Any:
    cache = offload.new_cache(max_tokens=1024)
    model(random_tokens(1, tokens), past_key_values=cache)
    return cache


def test_what_is_streamed_is_packed_and_gives_the_bits_of_dense_tokens() -> None:
    model, prompt, outcomes = small_model(), random_tokens(1, 170), []
    for kv_cache, form in (("auto", Format.PACKED), ("dense", Format.DENSE)):
        with attached(model, kv_cache=kv_cache) as offload:
            cache = offload.new_cache(max_tokens=1024)
            outputs = [model(prompt, past_key_values=cache).logits]
            outputs += [model(prompt[:, :1], past_key_values=cache).logits for _ in range(3)]
            assert form_of(cache) is form
            assert f"attached, {form.value} KV cache with " in repr(offload)
            outcomes.append(outputs)
    assert all(map(torch.equal, *outcomes))


def test_what_is_all_resident_is_dense_and_takes_what_it_took() -> None:
    model, taken = small_model(), []
    for kv_cache in ("auto", "dense"):
        with attached(model, kv_cache=kv_cache, resident_tokens="all") as offload:
            cache = passed(offload, model)
            engine = cache.state.engine
            assert form_of(cache) is Format.DENSE
            taken.append((engine.plan, engine.device_kv_bytes, engine.host_kv_bytes))
    assert taken[0] == taken[1]


def test_a_cache_keeps_its_form_when_it_is_planned_anew_and_copied() -> None:
    model = small_model()
    with attached(model, resident_tokens=120) as offload:
        short, long = offload.new_cache(max_tokens=100), passed(offload, model)
        model(random_tokens(1, 90), past_key_values=short)
        copied = copy.deepcopy(short)
        assert [form_of(each) for each in (short, copied, long)] == [
            Format.DENSE,
            Format.DENSE,
            Format.PACKED,
        ]
        assert "dense and packed KV cache with " in repr(offload)
        model(random_tokens(1, 90), past_key_values=copied)  # beyond its plan and its residents
        assert form_of(copied) is Format.DENSE
        long.batch_select_indices(torch.tensor([0, 0]))
        assert form_of(long) is Format.PACKED
        assert form_of(copy.deepcopy(long)) is Format.PACKED


def test_sessions_go_on_in_the_form_that_pays(tmp_path: Path) -> None:
    model, prompt, logits = small_model(), random_tokens(1, 180), []
    for kv_cache in ("dense", "auto"):
        with attached(model, kv_cache=kv_cache) as offload:
            cache = offload.new_cache(max_tokens=1024)
            model(prompt[:, :150], past_key_values=cache)
            cache.save(tmp_path / kv_cache)
    for saved in ("dense", "auto"):
        with attached(model) as offload:
            cache = offload.load_cache(tmp_path / saved, max_tokens=1024)
            assert form_of(cache) is Format.PACKED
            logits.append(model(prompt[:, 150:], past_key_values=cache).logits)
    assert torch.equal(*logits)


@pytest.mark.parametrize(
    "options",
    [{"fast": False}, {"gpus": 2}, {"dtype": torch.float32}, {"disk": True}],
    ids=["slow", "several", "float32", "disk"],
)
def test_what_was_not_timed_stays_dense(
    options: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    options = dict(options)
    model = small_model(options.pop("dtype", torch.bfloat16))
    if options.pop("disk", False):
        options["disk_cache"] = str(tmp_path)
    with attached(model, **options) as offload:
        assert form_of(passed(offload, model)) is Format.DENSE
    assert not caplog.records


def test_a_device_that_packs_wrongly_is_dense_without_a_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise OptionError("kv_cache=packed fails its check")

    model = small_model()
    host_format._is_checked.cache_clear()
    monkeypatch.setattr(host_format, "check_codec", refuse)
    caplog.set_level(logging.INFO, "headinfer")
    with attached(model) as offload:
        assert form_of(passed(offload, model)) is Format.DENSE
    host_format._is_checked.cache_clear()
    said = [record for record in caplog.records if "KV cache is dense" in record.message]
    assert [record.levelname for record in said] == ["INFO"]
    with pytest.raises(OptionError, match="fails its check"):
        attached(model, kv_cache="packed")
    assert not headinfer.api.owner_of(model)


def test_a_device_with_other_addresses_of_cpu_memory_is_dense(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def moved(_: SimulatedDevice, memory: torch.Tensor) -> torch.Tensor:
        return memory.clone()

    model = small_model()
    monkeypatch.setattr(SimulatedDevice, "mapped", moved)
    with attached(model, capture=False) as offload:
        assert form_of(passed(offload, model)) is Format.DENSE
