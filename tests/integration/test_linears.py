"""Products of decode calls on the CPU: as near to float32 as stock's, elsewhere stock's."""

import contextlib
import copy
import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.utils import prune
from transformers import PreTrainedModel

import headinfer
from headinfer.integration.calls import cache_argument
from headinfer.native import build
from headinfer.products.few_rows import few_rows_library
from tiny_models import random_tokens, tiny_model

pytestmark = pytest.mark.skipif(
    shutil.which("cc") is None or build._openmp_library() is None, reason="no compiled kernels"
)


def half(name: str = "llama3", dtype: torch.dtype = torch.bfloat16) -> PreTrainedModel:
    return tiny_model(name).to(dtype)


def own_forwards(model: torch.nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if name and "forward" in vars(module)}


@torch.no_grad()
def decoded(
    model: PreTrainedModel, tokens: torch.Tensor, step: int = 1, *, fuse: str = "auto"
) -> torch.Tensor:
    """Return the logits of all tokens but the first 20, `step` at a time behind those."""
    with headinfer.attach(model, device="cpu", fuse=fuse) as offload:
        cache = cache_argument(model, offload.new_cache())
        model(tokens[:, :20], **cache)
        steps = [model(part, **cache).logits for part in tokens[:, 20:].split(step, dim=1)]
    return torch.cat(steps, dim=1)


@pytest.mark.covering("name", "batch", "step", "dtype", most=4)
@pytest.mark.parametrize(
    ("name", "batch", "step", "dtype"),
    [  # each model and each shape in both dtypes
        (name, *shape, (torch.bfloat16, torch.float16)[(first + second) % 2])
        for first, name in enumerate(["llama3", "qwen2", "gemma3", "mixtral", "phi3", "qwen3-moe"])
        for second, shape in enumerate([(1, 1), (3, 1), (1, 5), (2, 4)])
    ],
)
@torch.no_grad()
def test_logits_are_as_near_to_float32_as_stocks(
    name: str, batch: int, step: int, dtype: torch.dtype
) -> None:
    exact = tiny_model(name)
    model = copy.deepcopy(exact).to(dtype)
    exact.load_state_dict(model.state_dict())  # of the same weights
    tokens = random_tokens(batch, 60)
    wanted = exact(tokens).logits[:, 20:]
    results = [decoded(model, tokens, step, fuse=fuse) for fuse in ("auto", "off")]
    errors = [(each - wanted).square().mean().sqrt().item() for each in results]
    assert errors[0] <= 1.05 * errors[1]
    assert own_forwards(model) == set()


def seen_in(call: Any, model: PreTrainedModel) -> list[set[str]]:
    """Return which modules had a forward of their own, each time the output layer was called."""
    seen: list[set[str]] = []
    hook = model.lm_head.register_forward_pre_hook(lambda *_: seen.append(own_forwards(model)))
    call()
    hook.remove()
    return seen


def test_they_are_in_place_during_decode_calls_alone() -> None:
    model, tokens = half(), random_tokens(1, 22)
    plain, *steps = seen_in(lambda: decoded(model, tokens), model)
    assert plain == set()
    linears = {name for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    assert steps == [linears, linears]
    assert "lm_head" in linears
    nothing: list[set[str]] = [set(), set(), set()]
    assert seen_in(lambda: decoded(model, tokens, fuse="off"), model) == nothing
    assert seen_in(lambda: decoded(model.float(), tokens), model) == nothing


def test_a_call_that_fails_leaves_nothing() -> None:
    model = half()

    def fail(*_: object) -> None:
        assert own_forwards(model)
        raise KeyboardInterrupt

    model.lm_head.register_forward_pre_hook(fail)
    with headinfer.attach(model, device="cpu"), pytest.raises(KeyboardInterrupt), torch.no_grad():
        model(random_tokens(1, 2))
    assert own_forwards(model) == set()


def test_hooks_of_others_are_called() -> None:
    model, tokens = half(), random_tokens(1, 24)
    model.lm_head.register_forward_hook(lambda _module, _args, output: output * 0 + 7)
    assert (decoded(model, tokens) == 7).all()


def test_weights_changed_in_place_are_seen_at_once() -> None:
    model, tokens = half(), random_tokens(1, 21)
    with headinfer.attach(model, device="cpu") as offload, torch.no_grad():
        cache = offload.new_cache()
        model(tokens[:, :20], **cache_argument(model, cache))
        first = model(tokens[:, 20:], **cache_argument(model, cache)).logits
        cache.crop(-1)
        model.lm_head.weight.data.mul_(2)  # as an adapter is merged
        second = model(tokens[:, 20:], **cache_argument(model, cache)).logits
    assert torch.equal(second, 2 * first)


class Adapted(torch.nn.Linear):
    """Stands for a product that somebody has adapted or quantised."""


def test_products_that_are_no_plain_ones_are_left_alone() -> None:
    model, tokens = half(), random_tokens(1, 21)
    mlp, attention = model.model.layers[0].mlp, model.model.layers[1].self_attn
    mlp.up_proj.__class__ = Adapted
    attention.q_proj.forward = attention.q_proj.forward  # as accelerate puts one there
    own = attention.q_proj.forward
    during = seen_in(lambda: decoded(model, tokens), model)[1]
    assert "model.layers.0.mlp.up_proj" not in during
    assert "model.layers.0.mlp.gate_proj" in during
    assert attention.q_proj.forward is own
    assert own_forwards(model) == {"model.layers.1.self_attn.q_proj"}


def logits_of_a_step(model: PreTrainedModel, context: Any, fuse: str) -> torch.Tensor:
    with headinfer.attach(model, device="cpu", fuse=fuse) as offload, context():
        cache = cache_argument(model, offload.new_cache())
        tokens = random_tokens(1, 31)
        model(tokens[:, :30], **cache)
        logits: torch.Tensor = model(tokens[:, 30:], **cache).logits
    return logits


@contextlib.contextmanager
def autocast() -> Iterator[None]:
    with torch.no_grad(), torch.autocast("cpu", torch.float16):
        yield


@pytest.mark.parametrize("context", [torch.enable_grad, autocast])
def test_gradients_and_autocast_are_stocks(context: Any) -> None:
    model = half()
    model.lm_head.requires_grad_()
    ours, stock = (logits_of_a_step(model, context, fuse) for fuse in ("auto", "off"))
    assert torch.equal(ours, stock)
    assert ours.requires_grad == stock.requires_grad


def test_a_pruned_product_computes_with_its_mask() -> None:
    model = half()
    down = model.model.layers[0].mlp.down_proj
    prune.random_unstructured(down, "weight", 0.5)
    ours, stock = (logits_of_a_step(model, torch.no_grad, fuse) for fuse in ("auto", "off"))
    torch.testing.assert_close(ours, stock)


@pytest.mark.slow
def test_parts_that_are_compiled_by_themselves_stay_whole() -> None:
    model, tokens = half(), random_tokens(1, 24)
    plain = decoded(model, tokens)
    for layer in model.model.layers:
        layer.mlp.compile(backend="eager", fullgraph=True)
    torch.testing.assert_close(decoded(model, tokens), plain, rtol=0.05, atol=0.05)


def test_without_a_compiler_products_are_stocks(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    model, tokens = half(), random_tokens(2, 24)
    stock = decoded(model, tokens, fuse="off")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CC", "no-such-compiler")
    few_rows_library.cache_clear()
    try:
        assert torch.equal(decoded(model, tokens), stock)
    finally:
        few_rows_library.cache_clear()


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda part: pickle.loads(pickle.dumps(part))]
)
@torch.no_grad()
def test_a_copy_made_during_a_step_computes_with_its_own_weights(duplicate: Any) -> None:
    model, tokens, made = half(), random_tokens(1, 21), []
    mlp = model.model.layers[0].mlp
    model.lm_head.register_forward_pre_hook(lambda *_: made.append(duplicate(mlp)))
    decoded(model, tokens)
    for rows in (1, 40):
        x = torch.randn(1, rows, 64).bfloat16()
        torch.testing.assert_close(made[1](x), mlp(x), rtol=0.05, atol=1e-3)
    mlp.down_proj.weight.zero_()
    assert made[1](x).any()
