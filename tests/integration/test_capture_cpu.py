"""Decode steps that are captured on the CPU: the bits of launched ones, whatever comes between."""

import copy
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch

import headinfer
from captured import NEW_CACHE, NEW_KIND, few, generated, launched, prompted, step, steps
from headinfer.integration import captured_step
from headinfer.integration.calls import cache_argument
from headinfer.offload import Offload
from tiny_models import ARCHITECTURES, random_tokens, tiny_model

FEW = ("llama3", "gemma3", "gpt-oss", "mixtral", "qwen3-next")
"""One of each kind."""

NOT_CAPTURED = {"qwen3-next": "while layers keep states of transformers' own"}


def outcomes(
    model: Any, use: Callable[[Offload], list[torch.Tensor]], **options: Any
) -> headinfer.Stats:
    """Return the stats with captures, where `use` returns the same tensors with them and without.

    Args:
        model: not attached; `use` leaves it as it was.
        use: uses the attached model.
        **options: of the attachment.
    """
    found = []
    for capture in (False, True):
        with headinfer.attach(model, device="cpu", capture=capture, **options) as offload:
            found.append(use(offload))
            stats = offload.stats
        assert capture or not stats.captures
    eager, captured = found
    assert len(eager) == len(captured)
    assert all(map(torch.equal, eager, captured))
    return stats


@pytest.mark.covering(most=3)
@torch.no_grad()
@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, pytest.param(torch.float32, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize(
    "name",
    [pytest.param(each, marks=() if each in FEW else pytest.mark.slow) for each in ARCHITECTURES],
)
def test_which_architectures_are_captured(
    name: str, dtype: torch.dtype, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "headinfer")
    model = tiny_model(name).to(dtype)
    past, count = 33, 9

    def use(offload: Offload) -> list[torch.Tensor]:
        cache = offload.new_cache()
        model(random_tokens(1, past), **cache_argument(model, cache))
        return steps(model, cache, count)

    stats = outcomes(model, use)
    if name in NOT_CAPTURED:
        assert stats.captured_steps == 0
        assert NOT_CAPTURED[name] in caplog.text
    else:
        assert (stats.captures, launched(stats)) == (1, few(past, count))


@pytest.fixture
def model() -> Any:
    return tiny_model("llama3").to(torch.bfloat16)


@torch.no_grad()
def test_the_next_cache_launches_fewer_steps(model: Any) -> None:
    def use(offload: Offload) -> list[torch.Tensor]:
        return [
            logits
            for seed in (1, 2)
            for logits in steps(model, prompted(offload, model, seed=seed), 9)
        ]

    assert launched(outcomes(model, use)) == few(40, 9) + few(40, 9, begin=NEW_CACHE)


@pytest.mark.covering
@torch.no_grad()
@pytest.mark.parametrize("name", ["llama3", "gemma3"])
@pytest.mark.parametrize(("rows", "reserved", "captures"), [(1, 64, 2), (3, 100, 1), (2, None, 1)])
def test_reserved_memory_is_one_launch_until_it_is_full(
    name: str, rows: int, reserved: int | None, captures: int
) -> None:
    model = tiny_model(name).to(torch.bfloat16)

    def use(offload: Offload) -> list[torch.Tensor]:
        cache = offload.new_cache(reserved)
        model(random_tokens(rows, 50), past_key_values=cache)
        tokens = torch.full((rows, 1), 7)
        return [step(model, cache, input_ids=tokens + at) for at in range(24)]

    assert outcomes(model, use).captures == captures


@torch.no_grad()
def test_many_tokens_are_attended_in_the_parts_of_launched_steps() -> None:
    model, threads = (
        tiny_model("llama3"),
        torch.get_num_threads(),
    )  # rounding to 16 bits may hide it

    def use(offload: Offload) -> list[torch.Tensor]:
        cache = offload.new_cache(3200)
        model(random_tokens(1, 3100), past_key_values=cache)
        return steps(model, cache, 6)

    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            assert outcomes(model, use).captured_steps == 3
    finally:
        torch.set_num_threads(threads)


@pytest.mark.covering(most=1)
@torch.no_grad()
@pytest.mark.parametrize("reserved", [None, 80])
def test_crops_copies_and_turns(model: Any, reserved: int | None) -> None:
    def use(offload: Offload) -> list[torch.Tensor]:
        cache = offload.new_cache(reserved)
        model(random_tokens(1, 40), past_key_values=cache)
        logits = steps(model, cache, 5)
        cache.crop(-2)
        logits += steps(model, cache, 4, first=20)
        other = copy.deepcopy(cache)
        for turn in range(3):
            logits += steps(model, cache, 2, first=30 + turn)
            logits += steps(model, other, 3, first=40 + turn)
        logits.append(model(random_tokens(1, 7, seed=4), past_key_values=cache).logits)
        return logits + steps(model, cache, 4) + [*cache.layers[1].keys]

    assert outcomes(model, use).captured_steps > 5


@pytest.mark.covering(most=2)
@pytest.mark.parametrize(
    ("rows", "options"),
    [(1, {"num_beams": 3}), (2, {"do_sample": True}), (1, {"prompt_lookup_num_tokens": 3})],
)
def test_ways_of_choosing_tokens(model: Any, rows: int, options: dict[str, Any]) -> None:
    def use(offload: Offload) -> list[torch.Tensor]:
        output = generated(model, random_tokens(rows, 24), offload.new_cache(), **options)
        return [output.sequences, *output.logits]

    outcomes(model, use)


@torch.no_grad()
def test_rows_with_padding_are_launched(model: Any) -> None:
    mask = torch.ones(2, 24, dtype=torch.long)
    mask[1, :5] = 0

    def use(offload: Offload) -> list[torch.Tensor]:
        given = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False}
        tokens = random_tokens(2, 24)
        return [model.generate(tokens, **cache_argument(model, offload.new_cache()), **given)]

    stats = outcomes(model, use)
    assert stats.captured_steps == 0


@torch.no_grad()
def test_weights_that_change_in_place_or_move_are_followed(model: Any) -> None:
    weights = copy.deepcopy(model.state_dict())

    def use(offload: Offload) -> list[torch.Tensor]:
        for weight in model.parameters():
            weight.data = weight.data.clone()
        model.load_state_dict(weights)
        cache = prompted(offload, model)
        logits = steps(model, cache, 6)
        for layer in model.model.layers:
            layer.mlp.up_proj.weight.mul_(1.5)
            layer.input_layernorm.weight.add_(0.25)
        logits += steps(model, cache, 4)
        model.share_memory()  # gives each weight other memory, and frees what it had
        logits += steps(model, cache, 2)
        model.model.norm.weight.mul_(0.5)
        return logits + steps(model, cache, 6)

    assert outcomes(model, use).captures == 2


@torch.no_grad()
def test_hooks_and_interrupts_are_heard(model: Any) -> None:
    heard = []

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    def use(offload: Offload) -> list[torch.Tensor]:
        cache = prompted(offload, model)
        logits = steps(model, cache, 6)
        with model.model.layers[1].mlp.register_forward_hook(lambda *_: heard.append(1)):
            logits += steps(model, cache, 3)
        logits += steps(model, cache, 3)
        with (
            model.model.layers[0].register_forward_hook(interrupt),
            pytest.raises(KeyboardInterrupt),
        ):
            step(model, cache)
        cache.reset()
        model(random_tokens(1, 40), past_key_values=cache)
        return logits + steps(model, cache, 5)

    assert outcomes(model, use).captured_steps > 5
    assert len(heard) == 6


@torch.no_grad()
def test_large_models_are_launched(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    weight_bytes = sum(weight.nbytes for weight in model.parameters())
    monkeypatch.setattr(captured_step, "_REPAYING_BYTES", weight_bytes // 2)
    stats = outcomes(model, lambda offload: steps(model, prompted(offload, model), NEW_KIND + 3))
    assert stats.captures == 0
