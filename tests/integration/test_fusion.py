"""Small parts of a model compiled by torch: as near to float32 as its own, and gone afterwards."""

import contextlib
import copy
import functools
import types
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from headinfer.device.base import CaptureError
from headinfer.integration import fusion
from headinfer.integration.fusion import FusedParts, Fusion
from tiny_models import random_tokens, tiny_model


def names_fused(model: PreTrainedModel) -> set[str]:
    """Return the modules that have a `forward` of their own, by the last part of their names."""
    return {
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if "forward" in module.__dict__
    }


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("llama3", {"input_layernorm", "post_attention_layernorm", "norm", "mlp", "self_attn"}),
        pytest.param(
            "gemma3",
            {
                *("input_layernorm", "post_attention_layernorm", "norm", "mlp", "self_attn"),
                *("q_norm", "k_norm", "pre_feedforward_layernorm", "post_feedforward_layernorm"),
            },
            marks=pytest.mark.slow,
        ),
    ],
)
@torch.no_grad()
def test_fused_parts_are_as_near_to_float32_as_the_models_own(name: str, parts: set[str]) -> None:
    exact = tiny_model(name)
    model = copy.deepcopy(exact).to(torch.bfloat16)
    exact.load_state_dict(model.state_dict())  # of the same weights
    tokens = random_tokens(8, 40)
    wanted, own = exact(tokens).logits, model(tokens).logits
    with FusedParts(model).on():
        assert names_fused(model) == parts
        fused = model(tokens).logits
    assert not names_fused(model)
    assert not torch.equal(fused, own)  # it was another program
    errors = [(each - wanted).square().mean().sqrt().item() for each in (fused, own)]
    assert errors[0] <= 1.02 * errors[1]


def test_a_part_with_a_forward_of_its_own_stays_as_it_is() -> None:
    model = tiny_model("llama3")
    layer = model.model.layers[1]
    own = layer.mlp.forward
    layer.mlp.forward = own  # as accelerate puts one there

    def interrupted() -> None:
        with FusedParts(model).on():
            assert layer.mlp.__dict__["forward"] is own
            assert "forward" in layer.input_layernorm.__dict__
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert names_fused(model) == {"mlp"}
    del layer.mlp.forward


def test_products_that_are_no_plain_ones_are_not_compiled() -> None:
    model = tiny_model("llama3")

    class Adapted(torch.nn.Linear):
        """Stands for a product that somebody has adapted."""

    mlp = model.model.layers[0].mlp
    mlp.up_proj.__class__ = Adapted
    with FusedParts(model).on():
        assert "forward" not in mlp.__dict__
        assert "forward" in model.model.layers[1].mlp.__dict__


class Trial:
    """A step whose outputs are given, the last of which may be an error."""

    def __init__(self, *outputs: Any) -> None:
        self.outputs = list(outputs)

    def __call__(self) -> Any:
        output = self.outputs.pop(0)
        if isinstance(output, BaseException):
            raise output
        return output


ONES = torch.ones(3)
TRIALS: dict[str, tuple[Trial, bool, bool, str]] = {
    # the trial, whether anything is fused after it, whether another is to come, what is said
    "near": (Trial(ONES, ONES * 1.01), True, False, ""),
    "far": (Trial(ONES, ONES * 2), False, False, "steps: fused, they give other results"),
    "failed": (Trial(ONES, ValueError("no\nmore")), False, False, "steps: no"),
    "no capture": (Trial(CaptureError("it reads")), True, True, ""),
    "stopped": (Trial(KeyboardInterrupt()), True, True, ""),
}


@pytest.mark.parametrize("case", TRIALS)
def test_nothing_is_fused_once_a_trial_has_failed(
    case: str, caplog: pytest.LogCaptureFixture
) -> None:
    trial, fused, untried, said = TRIALS[case]
    model = tiny_model("llama3")
    chosen = Fusion(model, enabled=True)
    assert chosen.untried
    with pytest.raises(KeyboardInterrupt) if case == "stopped" else contextlib.nullcontext():
        chosen.try_out(trial)
    with chosen.on():
        assert bool(names_fused(model)) == fused
    assert chosen.untried == untried
    assert [each.endswith(said) for each in caplog.messages] == [True] * bool(said)


def test_nothing_is_compiled_while_the_compiler_is_being_imported(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    done: list[str] = []
    waiting = types.SimpleNamespace(join=lambda: done.append("imported"))
    monkeypatch.setattr(fusion, "begin_import", lambda: waiting)
    Fusion(tiny_model("llama3"), enabled=True).try_out(lambda: done.append("run") or ONES)
    assert done == ["imported", "run", "run"]


def dispatched(name: str, places: dict[str, str]) -> PreTrainedModel:
    """Return a model that accelerate has spread, though all of it is on the CPU."""
    accelerate = pytest.importorskip("accelerate")
    model: PreTrainedModel = accelerate.dispatch_model(
        tiny_model(name), places, main_device="cpu", force_hooks=True
    )
    return model


LAYER_BY_LAYER = {
    f"model.{name}": "cpu"
    for name in ("embed_tokens", "rotary_emb", "layers.0", "layers.1", "layers.2", "norm")
} | {"lm_head": "cpu"}


@torch.no_grad()
def test_parts_are_fused_behind_hooks_that_move_nothing() -> None:
    model, plain = dispatched("llama3", LAYER_BY_LAYER), tiny_model("llama3")
    tokens = random_tokens(1, 9)
    before = {module: module.__dict__.get("forward") for module in model.modules()}
    with FusedParts(plain).on():
        wanted, fused = plain(tokens).logits, names_fused(plain)
    for _ in range(2):
        with FusedParts(model).on():
            inside = {
                name.rpartition(".")[2]
                for name, module in model.model.layers.named_modules()
                if isinstance(module.__dict__.get("forward"), types.MethodType)
            }
            assert inside == fused - {"norm"}
            assert "forward" not in model.model.layers[1].mlp.up_proj.__dict__
            assert torch.equal(model(tokens).logits, wanted)
    assert {module: module.__dict__.get("forward") for module in model.modules()} == before


@pytest.mark.parametrize(
    "change",
    [
        lambda module: setattr(module._hf_hook, "execution_device", "meta"),
        lambda module: setattr(module._hf_hook, "offload", True),
        lambda module: setattr(module._hf_hook, "io_same_device", True),
        lambda module: setattr(module, "_hf_hook", type("Other", (), {"offload": False})()),
    ],
    ids=["elsewhere", "brings", "returns", "another"],
)
def test_hooks_that_may_do_something_stay(change: Any) -> None:
    model = dispatched("llama3", LAYER_BY_LAYER)
    layers = model.model.layers
    change(layers[1].mlp.up_proj)
    with FusedParts(model).on():
        kept = [isinstance(layer.mlp.forward, functools.partial) for layer in layers]
        product = layers[1].mlp.up_proj.__dict__["forward"]
        assert not isinstance(product, types.MethodType)
    assert kept == [False, True, False]


def test_hooks_that_are_gone_by_then_do_not_come_back() -> None:
    accelerate = pytest.importorskip("accelerate")
    model = dispatched("llama3", LAYER_BY_LAYER)
    parts = FusedParts(model)
    with parts.on():
        pass
    accelerate.hooks.remove_hook_from_submodules(model)
    left = {module: module.__dict__.get("forward") for module in model.modules()}
    assert not any(isinstance(forward, functools.partial) for forward in left.values())
    with parts.on():
        pass
    assert {module: module.__dict__.get("forward") for module in model.modules()} == left
