"""Arguments that move between devices once a chunk, with the meta device as the second one."""

from typing import Any

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from headinfer.integration.crossing import Crossings
from tiny_models import random_tokens, tiny_model

LAYERS = 4


def spread_model(*others: str) -> PreTrainedModel:
    """Return a model whose later half is spread over the meta device, or parts of it."""
    model = tiny_model("llama3", num_hidden_layers=LAYERS)
    add_hook_to_module(model, AlignDevicesHook(execution_device="cpu", io_same_device=True))
    inside: Any = model.model
    places = [*(others or ["meta"] * (LAYERS // 2)), (others or ["meta"])[-1]]
    for module, place in zip((*inside.layers[LAYERS // 2 :], inside.norm), places, strict=True):
        for part in module.modules():
            add_hook_to_module(part, AlignDevicesHook(execution_device=place))
    return model


@pytest.fixture
def model() -> PreTrainedModel:
    return spread_model()


def given_to_layers(model: Any) -> list[tuple[torch.Tensor, ...]]:
    """Return a list to which each layer's attention adds the rotary tables it is given."""
    given: list[tuple[torch.Tensor, ...]] = []
    for layer in model.model.layers:
        layer.self_attn.register_forward_pre_hook(
            lambda _module, _args, kwargs: given.append(kwargs["position_embeddings"]),
            with_kwargs=True,
        )
    return given


def test_rotary_tables_move_once_to_a_device(model) -> None:
    given = given_to_layers(model)
    with torch.no_grad(), Crossings(model).once(discards=True):
        model(random_tokens(1, 9), use_cache=False)
    assert [tables[0].device.type for tables in given] == ["cpu", "cpu", "meta", "meta"]
    third, fourth = given[LAYERS // 2 :]
    assert third[0] is fourth[0]
    assert third[1] is fourth[1]


class Moves(TorchFunctionMode):
    """Notes from which kind of device what layers share is moved, and to which place."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, str]] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func is torch.Tensor.to and "non_blocking" in (kwargs or {}):
            self.seen.append((args[0].device.type, str(args[1])))
        return func(*args, **(kwargs or {}))


def test_what_layers_share_goes_from_each_device_to_the_next() -> None:
    model = spread_model("meta:1", "meta:2")
    given = given_to_layers(model)
    moves = Moves()
    with torch.no_grad(), Crossings(model).once(discards=True), moves:
        model(random_tokens(1, 9), use_cache=False)
    assert [tables[0].device.type for tables in given] == ["cpu", "cpu", "meta", "meta"]
    assert ("cpu", "meta:1") in moves.seen
    assert ("meta", "meta:2") in moves.seen
    assert ("cpu", "meta:2") not in moves.seen


def test_an_output_that_nobody_uses_stays_where_it_is(model) -> None:
    with torch.no_grad(), Crossings(model).once(discards=True):
        output = model(random_tokens(1, 9), use_cache=False, logits_to_keep=1)
    assert output.logits.device.type == "meta"


@pytest.mark.parametrize("fails", [False, True])
def test_all_is_as_it_was_afterwards(model, fails) -> None:
    head = model.get_output_embeddings()
    had, of_head = model._hf_hook.io_same_device, head.forward
    try:
        with Crossings(model).once(discards=True):
            assert head.forward is not of_head
            if fails:
                raise KeyError("a chunk's")
    except KeyError:
        assert fails
    assert model._hf_hook.io_same_device is had is True
    assert head.forward == of_head
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_an_output_that_is_used_comes_back() -> None:
    model = tiny_model("llama3")
    add_hook_to_module(model, AlignDevicesHook(execution_device="cpu", io_same_device=True))
    tokens = random_tokens(1, 9)
    with torch.no_grad():
        wanted = model(tokens).logits
        with Crossings(model).once(discards=False):
            assert model._hf_hook.io_same_device
            assert model(tokens).logits.equal(wanted)


def test_a_device_is_left_before_anything_crosses(model) -> None:
    given, left_after = given_to_layers(model), []
    with (
        torch.no_grad(),
        Crossings(model).once(discards=True, leaving=lambda: left_after.append(len(given))),
    ):
        model(random_tokens(1, 9), use_cache=False)
    assert left_after == [LAYERS // 2]
