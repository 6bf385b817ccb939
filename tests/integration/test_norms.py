"""Norms of prompts beside a GPU: torch's kernel where it rounds as the model does, else stock's."""

import copy
import threading
from typing import Any

import pytest
import torch
import transformers
from transformers import PreTrainedModel

import headinfer
from families import tiny_family
from families_expected import SERVED
from headinfer.integration.calls import cache_argument
from headinfer.integration.norms import PromptNorms
from tiny_models import random_tokens, tiny_model

NORMS = {"input_layernorm", "post_attention_layernorm", "norm"}
DTYPES = torch.bfloat16, torch.float16


def half(name: str = "llama3", dtype: torch.dtype = torch.bfloat16) -> PreTrainedModel:
    model = tiny_model(name).to(dtype)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for part, weights in model.named_parameters():
            if "norm" in part:  # or all were ones
                weights.copy_(torch.rand(weights.shape, generator=generator))
    return model


def own_forwards(model: PreTrainedModel) -> set[str]:
    return {
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if name and "forward" in vars(module)
    }


def replaced(model: PreTrainedModel) -> set[str]:
    with PromptNorms(model, enabled=True).on(1, 100):
        return own_forwards(model)


def watched(model: PreTrainedModel) -> list[tuple[int, bool]]:
    """Return what a norm will note: the tokens of each of its calls, and whether it is replaced."""
    seen: list[tuple[int, bool]] = []
    norm = model.model.layers[1].input_layernorm
    norm.register_forward_pre_hook(
        lambda module, given: seen.append((given[0].shape[1], "forward" in vars(module)))
    )
    return seen


@pytest.mark.covering
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["llama3", "qwen3"])
@torch.no_grad()
def test_a_prompts_logits_are_stocks(name: str, dtype: torch.dtype) -> None:
    """On the CPU torch has no kernel of its own, and sums in the same order."""
    model, tokens = half(name, dtype), random_tokens(8, 77)
    wanted = model(tokens).logits
    assert replaced(model) >= NORMS
    with PromptNorms(model, enabled=True).on(1, 77):
        assert torch.equal(model(tokens).logits, wanted)


@torch.no_grad()
def test_they_are_in_place_during_prompts_alone() -> None:
    model = half()
    seen = watched(model)
    with headinfer.attach(model, device="simulated", chunk_tokens=32) as offload:
        cache = cache_argument(model, offload.new_cache())
        model(random_tokens(8, 77), **cache)
        assert seen == [(32, True), (32, True), (13, True)]
        seen.clear()
        assert not own_forwards(model)
        for tokens in (1, 8):
            model(random_tokens(8, tokens), **cache)
        assert seen == [(1, False), (8, False)]


@torch.no_grad()
def test_steps_between_a_prompts_chunks_have_the_models_own() -> None:
    model = half()
    offload = headinfer.attach(model, device="simulated", chunk_tokens=32)
    other = cache_argument(model, offload.new_cache())
    model(random_tokens(8, 20), **other)
    seen = watched(model)

    def answer() -> None:
        with torch.no_grad():
            for _ in range(4):
                model(random_tokens(8, 1), **other)

    with offload:
        thread = threading.Thread(target=answer)
        thread.start()
        model(random_tokens(8, 320), **cache_argument(model, offload.new_cache()))
        thread.join()
    assert sorted(set(seen)) == [(1, False), (32, True)]


GATED = {"BambaForCausalLM", "GraniteMoeHybridForCausalLM"}
REST = sorted(set(SERVED.split()) - GATED)


@pytest.mark.parametrize(
    "name", [*sorted(GATED), *(pytest.param(name, marks=pytest.mark.slow) for name in REST)]
)
@torch.no_grad()
def test_prompts_of_families_in_16_bits_are_as_without(name: str) -> None:
    """Some of their norms are given a gate, and some compute something else."""
    if not hasattr(transformers, name):
        pytest.skip("this transformers has no such model")
    model, tokens = tiny_family(name).to(torch.bfloat16), torch.arange(3, 43)[None]
    logits = []
    for fuse in ("off", "auto"):
        with headinfer.attach(model, device="simulated", fuse=fuse) as offload:
            logits.append(model(tokens, **cache_argument(model, offload.new_cache())).logits)
    assert torch.equal(*logits)


def test_a_norm_that_cannot_be_tried_stays_as_it_is() -> None:
    model = half()
    kind = type(model.model.norm)

    class TupleNorm(kind):  # type: ignore[misc, valid-type]
        def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor]:
            return (super().forward(hidden_states),)

    model.model.norm.__class__ = TupleNorm
    assert replaced(model) == NORMS - {"norm"}


@torch.no_grad()
def test_norms_of_one_class_are_told_apart_by_what_they_are_set_to() -> None:
    model = half()
    kind = type(model.model.norm)

    class OffsetNorm(kind):  # type: ignore[misc, valid-type]
        def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
            return super().forward(hidden_states) + self.offset  # type: ignore[no-any-return]

    for offset, layer in enumerate(model.model.layers[:2]):
        layer.input_layernorm.__class__ = OffsetNorm
        layer.input_layernorm.offset = offset
    with PromptNorms(model, enabled=True).on(1, 100):
        assert "forward" in vars(model.model.layers[0].input_layernorm)
        assert "forward" not in vars(model.model.layers[1].input_layernorm)


def test_the_device_new_tensors_have_by_default_does_not_matter() -> None:
    model = half()
    with torch.device("meta"):
        assert replaced(model) == NORMS


@torch.no_grad()
@pytest.mark.parametrize("options", [{"device": "cpu"}, {"device": "simulated", "fuse": "off"}])
def test_elsewhere_they_stay_as_they_are(options: dict[str, Any]) -> None:
    model = half()
    seen = watched(model)
    with headinfer.attach(model, **options) as offload:
        model(random_tokens(8, 77), **cache_argument(model, offload.new_cache()))
    assert seen == [(77, False)]


def test_norms_of_another_kind_stay_as_they_are() -> None:
    assert not replaced(half("gemma3"))  # it adds 1 to weights, in float32
    assert not replaced(tiny_model("llama3"))  # in float32 nothing is won
    model = half()
    kind = type(model.model.norm)

    class RoundedOnceNorm(kind):  # type: ignore[misc, valid-type]
        def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
            wide = hidden_states.float()
            spread = wide.pow(2).mean(-1, keepdim=True) + self.variance_epsilon
            return (self.weight.float() * wide * spread.rsqrt()).to(hidden_states.dtype)

    class ShrinkingNorm(kind):  # type: ignore[misc, valid-type]
        def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
            return super().forward(hidden_states) * (1 - 2**-6)  # type: ignore[no-any-return]

    for layer, other in zip(model.model.layers, (RoundedOnceNorm, ShrinkingNorm), strict=False):
        layer.input_layernorm.__class__ = other
        for autocast in (False, True):
            with (
                torch.autocast("cpu", torch.float16, enabled=autocast),
                PromptNorms(model, enabled=True).on(1, 100),
            ):
                assert "forward" not in vars(layer.input_layernorm)
                assert "forward" in vars(layer.post_attention_layernorm)


def test_a_norm_with_a_forward_of_its_own_stays_as_it_is() -> None:
    model = half()
    norm = model.model.layers[0].input_layernorm
    own = norm.forward = norm.forward  # as accelerate puts one there
    with PromptNorms(model, enabled=True).on(1, 100):
        assert vars(norm)["forward"] is own
        assert own_forwards(model) == NORMS
    assert vars(norm)["forward"] is own
    assert own_forwards(model) == {"input_layernorm"}


@pytest.mark.parametrize(
    "context", [torch.enable_grad(), torch.autocast("cpu", torch.float16)], ids=["grad", "autocast"]
)
def test_gradients_and_autocast_are_stocks(context: Any) -> None:
    norm = half().model.norm
    states = torch.randn(1, 40, norm.weight.numel(), dtype=torch.bfloat16)
    with context:
        wanted = norm(states)
        with PromptNorms(norm, enabled=True).on(1, 40):
            given = norm(states)
    assert given.dtype is wanted.dtype
    assert torch.equal(given, wanted)
    assert given.requires_grad == wanted.requires_grad


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [17, 77, 1000])
@torch.no_grad()
def test_a_prompts_logits_are_as_near_to_float32_as_stocks(dtype: torch.dtype, tokens: int) -> None:
    model = half("qwen3", dtype).to("cuda")
    exact, prompt = copy.deepcopy(model).float(), random_tokens(8, tokens).to("cuda")
    assert replaced(model) >= NORMS
    wanted, own = exact(prompt).logits, model(prompt).logits
    with PromptNorms(model, enabled=True).on(1, tokens):
        given = model(prompt).logits
    errors = [(each - wanted).square().mean().sqrt().item() for each in (given, own)]
    assert errors[0] <= 1.05 * errors[1]
