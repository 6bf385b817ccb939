"""What is made from an attached model, stands before it, or outlives it, is as usable as ever."""

import copy
import functools
import gc
import inspect
import io
import json
import pickle
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from test_lifecycle import snapshot
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoModelForCausalLM,
    StaticCache,
)

import headinfer
from headinfer.device.simulated import SimulatedDevice
from headinfer.errors import UnsupportedModelError
from headinfer.integration.calls import cache_argument
from tiny_models import random_tokens, shared_model, tiny_model

NAMES = ["llama3", "gemma3", "qwen3-next"]


def pickled(model: Any) -> Any:
    return pickle.loads(pickle.dumps(model))


def saved(model: Any) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.covering
@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickled, saved])
@pytest.mark.parametrize("name", NAMES)
def test_a_copy_of_an_attached_model_is_a_plain_model(name: str, duplicate: Any) -> None:
    model = tiny_model(name)
    tokens = random_tokens(1, 30)
    stock = model.generate(tokens, max_new_tokens=4, do_sample=False)
    plain = {key: value for key, value in snapshot(duplicate(model)).items() if key != "configs"}
    with headinfer.attach(model, device="simulated", chunk_tokens=8) as offload:
        made = duplicate(model)
        registries = snapshot(model)["registries"]
        assert {**snapshot(made), "registries": plain["registries"]} | {"configs": None} == {
            **plain,
            "configs": None,
        }
        assert snapshot(made)["registries"] == registries
        assert torch.equal(made.generate(tokens, max_new_tokens=4, do_sample=False), stock)
        with torch.no_grad():
            for parameter in made.parameters():
                parameter.zero_()  # they are its own
        ours = model.generate(
            tokens, max_new_tokens=4, do_sample=False, **cache_argument(model, offload.new_cache())
        )
        assert torch.equal(ours, stock)
        with headinfer.attach(made):
            made(tokens)
        again = duplicate(model)
    assert torch.equal(again.generate(tokens, max_new_tokens=4, do_sample=False), stock)


def test_a_copy_of_what_holds_an_attached_model_is_plain_too() -> None:
    model = tiny_model("llama3")
    tokens = random_tokens(1, 30)
    stock = model(tokens).logits
    with headinfer.attach(model):
        holder = copy.deepcopy(torch.nn.ModuleDict({"inner": model}))
        inner = copy.deepcopy(model.model)
    assert torch.equal(holder["inner"](tokens).logits, stock)
    assert torch.equal(model.lm_head(inner(tokens).last_hidden_state), stock)


@pytest.mark.parametrize("name", NAMES)
def test_a_model_made_from_an_attached_ones_config_outlives_the_attachment(name: str) -> None:
    model = tiny_model(name)
    tokens = random_tokens(1, 30)
    stock = model(tokens).logits
    with headinfer.attach(model) as offload:
        made = [
            type(model)(model.config),
            type(model)(copy.deepcopy(model.config)),
            AutoModelForCausalLM.from_config(model.config),
        ]
        for other in made:
            other.load_state_dict(model.state_dict())
            other.eval().requires_grad_(False)
            torch.testing.assert_close(other(tokens).logits, stock)
            with headinfer.attach(other) as second:  # it is not attached already
                ours = other(tokens, **cache_argument(other, second.new_cache())).logits
                torch.testing.assert_close(ours, stock)
        ours = model(tokens, **cache_argument(model, offload.new_cache())).logits
        torch.testing.assert_close(ours, stock)
    for other in made:
        torch.testing.assert_close(other(tokens).logits, stock)
        assert other.config._attn_implementation == model.config._attn_implementation


def test_a_static_cache_is_refused_by_a_model_that_shares_an_attached_ones_config() -> None:
    model = tiny_model("llama3")
    tokens = random_tokens(1, 10)
    with headinfer.attach(model):
        other = type(model)(model.config).eval().requires_grad_(False)
        cache = StaticCache(config=model.config, max_cache_len=32)
        with pytest.raises(UnsupportedModelError, match="memory beyond its tokens"):
            other(tokens, **cache_argument(model, cache))
    cache = StaticCache(config=model.config, max_cache_len=32)
    ours = other(tokens, **cache_argument(model, cache)).logits
    torch.testing.assert_close(ours, other(tokens).logits)


def test_a_model_saved_while_attached_does_not_name_our_attention(tmp_path: Path) -> None:
    model = tiny_model("gemma3")
    model.save_pretrained(tmp_path / "before")
    with headinfer.attach(model):
        model.save_pretrained(tmp_path / "attached")
        assert "headinfer" not in json.dumps(model.config.to_dict(), default=str)
        assert "headinfer" not in model.config.to_json_string(use_diff=False)
    for file in (tmp_path / "before").iterdir():
        assert (tmp_path / "attached" / file.name).read_bytes() == file.read_bytes()


def cover(model: Any) -> None:
    """Stand before a model's `forward` as accelerate does."""
    model._old_forward = model.forward

    def forward(module: Any, *args: Any, **kwargs: Any) -> Any:
        module.covered = getattr(module, "covered", 0) + 1
        return module._old_forward(*args, **kwargs)

    model.forward = functools.update_wrapper(functools.partial(forward, model), model.forward)


def uncover(model: Any) -> None:
    model.forward = model._old_forward
    del model._old_forward


ORDERS = [
    "cover attach use detach use uncover use",
    "cover attach use uncover use detach use",
    "attach cover use detach use uncover use",
    "attach cover use uncover use detach use",
    "attach cover detach attach use detach use uncover use",
    "attach cover detach attach use uncover use detach use",
]


@pytest.mark.parametrize("order", ORDERS)
def test_others_may_stand_before_the_model_and_leave_in_any_order(order: str) -> None:
    model: Any = tiny_model("llama3")
    tokens = random_tokens(1, 30)
    stock = model(tokens).logits
    offload = None
    for step in order.split():
        if step == "use":
            cache = {} if offload is None else cache_argument(model, offload.new_cache())
            assert "logits_to_keep" in inspect.signature(model.forward).parameters
            torch.testing.assert_close(model(tokens, **cache).logits, stock)
            made = copy.deepcopy(model)
            with torch.no_grad():
                made.lm_head.weight.zero_()  # a copy runs with weights of its own
            assert not made(tokens).logits.any()
        elif step == "attach":
            offload = headinfer.attach(model, device="simulated", chunk_tokens=8)
        elif step == "detach":
            headinfer.detach(model)
            offload = None
        else:
            {"cover": cover, "uncover": uncover}[step](model)
    assert type(model.forward).__module__ != "headinfer.integration.forward"
    assert not [name for name in model.__dict__ if "headinfer" in name or name == "__reduce_ex__"]


def test_layers_called_around_the_models_forward_are_served_and_that_is_said(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = shared_model("llama3")
    tokens = random_tokens(1, 30)
    stock = model(tokens).logits
    with headinfer.attach(model, device="simulated", chunk_tokens=8) as offload:
        cache = offload.new_cache()
        for part in (tokens[:, :20], tokens[:, 20:]):
            hidden = model.model(part, **cache_argument(model, cache)).last_hidden_state
        assert "not through its own forward" in caplog.text
        assert len(caplog.records) == 1
    torch.testing.assert_close(model.lm_head(hidden), stock[:, 20:])


def test_hooks_of_others_see_one_call_with_what_was_passed_and_what_comes_out() -> None:
    model = tiny_model("llama3")
    tokens = random_tokens(1, 30)
    seen: list[Any] = []
    model.register_forward_pre_hook(
        lambda _module, args, kwargs: seen.append((args, kwargs)), with_kwargs=True
    )
    with headinfer.attach(model, chunk_tokens=8) as offload:
        model.register_forward_hook(lambda _module, _args, output: seen.append(output.logits))
        cache = cache_argument(model, offload.new_cache())
        logits = model(tokens, **cache).logits
    assert len(seen) == 2
    assert seen[0][0][0] is tokens
    assert seen[0][1] == cache
    assert seen[1] is logits
    assert logits.shape[1] == 30


def test_a_lost_handle_is_found_through_the_model() -> None:
    model = tiny_model("llama3")
    before = snapshot(model)

    def attach_and_forget() -> None:
        headinfer.attach(model)

    attach_and_forget()
    with pytest.raises(UnsupportedModelError, match=r"headinfer\.detach\(model\)"):
        headinfer.attach(model)
    headinfer.detach(model)
    assert snapshot(model) == before
    headinfer.detach(model)  # nothing to do
    with headinfer.attach(model):
        headinfer.detach(model)
        assert snapshot(model) == before
    assert snapshot(model) == before


def test_a_model_dropped_while_attached_is_freed_with_all_it_held() -> None:
    registries = (AttentionInterface._global_mapping, AttentionMaskInterface._global_mapping)
    entries = [set(registry) for registry in registries]
    device = SimulatedDevice()
    model = tiny_model("llama3")
    offload = headinfer.attach(model, device="simulated", simulated_device=device)
    cache = offload.new_cache()
    model(random_tokens(1, 40), **cache_argument(model, cache))
    gone = [weakref.ref(thing) for thing in (model, offload, cache, cache.state.engine)]
    assert device.allocated_bytes
    del model, offload, cache
    gc.collect()
    assert [reference() for reference in gone] == [None] * 4
    assert device.allocated_bytes == 0
    assert [set(registry) for registry in registries] == entries
