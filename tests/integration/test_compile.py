"""`torch.compile` and an attached model get along: it keeps its hands off what is ours."""

from typing import Any

import pytest
import torch

import headinfer
from headinfer.integration.calls import cache_argument
from tiny_models import random_tokens, tiny_model


def compiled(model: Any, what: str, **options: Any) -> Any:
    """Have a part of a model compiled, in one of the ways there are; returns what to call."""
    if what == "forward":
        model.forward = torch.compile(model.forward, **options)
    elif what == "module":
        model.compile(**options)
    elif what == "wrapped":
        return torch.compile(model, **options)
    elif what == "decoder":
        model.model.compile(**options)
    else:
        for layer in model.model.layers:
            layer.compile(**options)
    return model


def check(what: str, device: str, *, first: bool, layers: int, **options: Any) -> None:
    """Compare with stock, for a padded prompt in chunks and some tokens behind it."""
    torch.compiler.reset()
    model = tiny_model("llama3", num_hidden_layers=layers)
    tokens = random_tokens(2, 40)
    mask = torch.ones_like(tokens)
    mask[0, :5] = 0
    stock = model(tokens, attention_mask=mask).logits
    called = compiled(model, what, **options) if first else model
    parts = []
    with headinfer.attach(model, device=device, tile_tokens=8, chunk_tokens=16) as offload:
        if not first:
            called = compiled(model, what, **options)
        cache = cache_argument(model, offload.new_cache())
        for start, end in ((0, 38), (38, 39), (39, 40)):
            part, seen = tokens[:, start:end], mask[:, :end]
            parts.append(called(part, attention_mask=seen, **cache).logits)
    ours = torch.cat(parts, dim=1)
    visible = mask.bool()
    torch.testing.assert_close(ours[visible], stock[visible])


@pytest.mark.covering(most=1)
@pytest.mark.parametrize("what", ["forward", "module", "wrapped"])
def test_a_compiled_model_gives_the_same(what: str) -> None:
    check(what, "simulated", first=False, layers=1, backend="eager")


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("first", [True, False], ids=["before", "after"])
@pytest.mark.parametrize("what", ["forward", "module", "wrapped", "decoder", "layers"])
@pytest.mark.parametrize("device", ["cpu", "simulated"])
def test_every_way_of_compiling_gives_the_same(
    device: str, what: str, first: bool, backend: str
) -> None:
    check(what, device, first=first, layers=2, backend=backend)
