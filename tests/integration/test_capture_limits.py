"""Decode steps that must not be replayed, and captures that end: by weights, errors and closing."""

import contextlib
import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.nn.modules import module as torch_module
from transformers import PreTrainedModel

import headinfer
from captured import (
    NEW_CACHE,
    NEW_KIND,
    NEW_TURN,
    SIMULATED,
    few,
    generated,
    launched,
    prompted,
    step,
    steps,
    with_and_without_capture,
)
from headinfer.device.simulated_capture import SimulatedCapture
from headinfer.integration.calls import cache_argument
from headinfer.offload import Offload
from tiny_models import random_tokens, tiny_model


@pytest.fixture
def model() -> PreTrainedModel:
    """A model of the test's own, which it may change."""
    return tiny_model("llama3")


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [each.getMessage() for each in caplog.records if each.levelno >= logging.WARNING]


class Around(torch.nn.Module):
    """A module in the place of another, which does something before it."""

    def __init__(self, inner: torch.nn.Module, before: Callable[[torch.Tensor], Any]) -> None:
        super().__init__()
        self.inner = inner
        self.before = before

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        changed = self.before(hidden)
        return self.inner(hidden if changed is None else changed)


@contextlib.contextmanager
def forward_hook(module: torch.nn.Module, hook: Callable[..., Any]) -> Iterator[None]:
    handle = module.register_forward_hook(hook)
    yield
    handle.remove()


@contextlib.contextmanager
def pre_hook(module: torch.nn.Module, hook: Callable[..., Any]) -> Iterator[None]:
    handle = module.register_forward_pre_hook(hook)
    yield
    handle.remove()


@contextlib.contextmanager
def keyword_hook(module: torch.nn.Module, hook: Callable[..., Any]) -> Iterator[None]:
    handle = module.register_forward_hook(hook, with_kwargs=True, prepend=True)
    yield
    handle.remove()


@contextlib.contextmanager
def global_hook(_module: torch.nn.Module, hook: Callable[..., Any]) -> Iterator[None]:
    handle = torch_module.register_module_forward_hook(hook)
    yield
    handle.remove()


@contextlib.contextmanager
def global_pre_hook(_module: torch.nn.Module, hook: Callable[..., Any]) -> Iterator[None]:
    handle = torch_module.register_module_forward_pre_hook(hook)
    yield
    handle.remove()


HOOKS = [forward_hook, pre_hook, keyword_hook, global_hook, global_pre_hook]


@pytest.mark.parametrize("hooked", HOOKS)
def test_hooks_are_called_in_each_step_they_are_there(
    hooked: Callable[..., Any], model: PreTrainedModel
) -> None:
    module = model.model.layers[1].mlp
    calls: list[torch.nn.Module] = []

    def note(called: torch.nn.Module, *_arguments: Any) -> None:
        if called is module:
            calls.append(called)

    with headinfer.attach(model, **SIMULATED) as offload:
        cache = prompted(offload, model)
        steps(model, cache, 5)
        assert launched(offload.stats) == NEW_KIND
        for _ in range(2):
            calls.clear()
            with hooked(module, note):
                steps(model, cache, 4)
            assert len(calls) == 4
            steps(model, cache, 4)
            assert len(calls) == 4
        assert launched(offload.stats) == NEW_KIND + 2 * (4 + NEW_TURN)
        assert offload.stats.captures == 1


def test_a_hook_from_before_the_attachment_is_called(model: PreTrainedModel) -> None:
    calls: list[int] = []
    model.lm_head.register_forward_hook(lambda *_: calls.append(1))
    with headinfer.attach(model, **SIMULATED) as offload:
        steps(model, prompted(offload, model), 6)
        assert (len(calls), offload.stats.captures) == (7, 0)


def test_what_is_launched_for_now_is_said_once_with_the_reason(
    model: PreTrainedModel, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "headinfer.integration")
    with headinfer.attach(model, **SIMULATED) as offload:
        cache = prompted(offload, model)
        steps(model, cache, 5)
        assert caplog.records == []
        with forward_hook(model.lm_head, lambda *_: None):
            steps(model, cache, 3)
        for columns in (49, 50, 51):
            mask = torch.ones(1, columns).long()
            mask[0, 0] = 0
            step(model, cache, attention_mask=mask)
    begin = "decode steps are launched kernel by kernel while "
    reasons = "others have hooks on the model's modules", "some of their tokens are padding"
    assert [(each.levelno, each.getMessage()) for each in caplog.records] == [
        (level, begin + reason)
        for reason in reasons
        for level in (logging.INFO, logging.DEBUG, logging.DEBUG)
    ]


def test_hooks_on_the_model_itself_are_called_around_replays(model: PreTrainedModel) -> None:
    called: list[str] = []

    def double(_model: torch.nn.Module, _args: Any, output: Any) -> None:
        output.logits.mul_(2)

    def use(offload: Offload) -> list[torch.Tensor]:
        cache = prompted(offload, model)
        called.clear()
        with (
            pre_hook(model, lambda *_: called.append("before")),
            forward_hook(model, double),
        ):
            return steps(model, cache, 8)

    stats, _ = with_and_without_capture(model, use)
    assert called == ["before"] * 8
    assert launched(stats) == NEW_KIND


def test_what_a_hook_returns_counts(model: PreTrainedModel) -> None:
    def use(offload: Offload) -> list[torch.Tensor]:
        cache = prompted(offload, model)
        outputs = steps(model, cache, 5)
        with forward_hook(model.model.norm, lambda _module, _args, output: output * 2):
            outputs += steps(model, cache, 5)
        return outputs + steps(model, cache, 5)

    stats, _ = with_and_without_capture(model, use)
    assert stats.captured_steps == 5 - NEW_KIND + 5 - NEW_TURN


@pytest.mark.parametrize("name", ["llama3", "gemma3"])
def test_a_number_that_grows_is_noticed(name: str, caplog: pytest.LogCaptureFixture) -> None:
    model, caches = tiny_model(name), []

    def use(offload: Offload) -> list[torch.Tensor]:
        caches.clear()
        caches.append(prompted(offload, model))
        outputs = steps(model, caches[-1], 12)
        caches.append(prompted(offload, model, seed=2))
        return outputs + steps(model, caches[-1], 12)

    def grow(hidden: torch.Tensor) -> torch.Tensor | None:
        return hidden + caches[-1].get_seq_length() / 100 if caches else None

    # Where nothing is counted yet, a capture and a call see the same number at the same token.
    first = model.model.layers[0]
    first.input_layernorm = Around(first.input_layernorm, grow)
    stats, _ = with_and_without_capture(model, use)
    assert (stats.captures, stats.captured_steps) == (1, 0)
    assert len(warnings(caplog)) == 1
    assert "kernel by kernel: captured, they give other bits; capture=False" in caplog.text


def test_a_number_that_grows_later_is_noticed_in_the_next_turn(
    model: PreTrainedModel, caplog: pytest.LogCaptureFixture
) -> None:
    factor = [1.0]
    model.lm_head = Around(model.lm_head, lambda hidden: hidden * factor[0])

    def use(offload: Offload) -> list[torch.Tensor]:
        factor[0] = 1.0
        cache, outputs = prompted(offload, model), []
        for turn in range(3):
            outputs += [step(model, cache, 9) for _ in range(6)]
            outputs.append(model(random_tokens(1, 5), **cache_argument(model, cache)).logits)
            factor[0] = 2.0 + turn
        return outputs

    stats, _ = with_and_without_capture(model, use)
    # Compared in vain, captured, compared: in both further turns. Their tokens count as drafts.
    assert launched(stats) - 3 == NEW_KIND + 2 * 3
    assert warnings(caplog) == []


def test_a_branch_at_some_length_is_noticed_when_the_tokens_have_doubled(
    model: PreTrainedModel, caplog: pytest.LogCaptureFixture
) -> None:
    caches: list[Any] = []

    def branch(hidden: torch.Tensor) -> torch.Tensor | None:
        return hidden * 2 if caches and caches[-1].get_seq_length() >= 64 else None

    def use(offload: Offload) -> list[torch.Tensor]:
        caches.clear()
        cache = prompted(offload, model)
        caches.append(cache)
        return steps(model, cache, 40)

    # Before its attention, where a call and a capture see the same number at the same token.
    first = model.model.layers[0]
    first.input_layernorm = Around(first.input_layernorm, branch)
    stats, _ = with_and_without_capture(model, use)
    compared_in_vain = 1
    assert launched(stats) == NEW_KIND + compared_in_vain + NEW_KIND - 1
    assert stats.captures == 2
    assert warnings(caplog) == []


@pytest.mark.parametrize("form", [{}, {"resident_tokens": 0}], ids=["one launch", "in pieces"])
def test_what_takes_one_step_is_not_captured(form: dict[str, Any], model: PreTrainedModel) -> None:
    with headinfer.attach(model, **{**SIMULATED, **form}) as offload:
        for conversation in range(3):  # a score each, or an answer of two tokens
            cache = prompted(offload, model, seed=conversation)
            for _ in range(2):
                steps(model, cache, 1)
                assert offload.stats.captures == 0
                model(random_tokens(1, 40), **cache_argument(model, cache))
        steps(model, cache, 3)
        assert (offload.stats.captures, offload.stats.captured_steps) == (1, 0)
        another = prompted(offload, model)
        steps(model, another, 1)
        assert offload.stats.captures == 1
        steps(model, another, 2)
        assert (offload.stats.captures, offload.stats.captured_steps) == (2, 1)


OF_TWO_ROWS = torch.tensor([[5], [6]])

READINGS: dict[str, Callable[[torch.Tensor], Any]] = {
    "item": lambda hidden: hidden.sum().item(),
    "bool": lambda hidden: bool(hidden.isnan().any()),
    "tolist": lambda hidden: hidden.argmax().tolist(),
    "mask": lambda hidden: hidden[hidden > 0],
    "where": lambda hidden: torch.where(hidden > 0),
    "numpy": lambda hidden: hidden.numpy(),
}


@pytest.mark.covering(most=3)
@pytest.mark.parametrize("reading", READINGS.values(), ids=READINGS)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_model_that_reads_back_is_launched(
    reading: Callable[[torch.Tensor], Any],
    mode: Callable[[], Any],
    model: PreTrainedModel,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def read(hidden: torch.Tensor) -> None:
        reading(hidden)

    def use(offload: Offload) -> list[torch.Tensor]:
        with mode():
            other = steps(model, prompted(offload, model, rows=2), 6, input_ids=OF_TWO_ROWS)
            return steps(model, prompted(offload, model), 6) + other

    model.lm_head = Around(model.lm_head, read)
    stats, _ = with_and_without_capture(model, use)
    assert stats.captured_steps == 0
    assert len(warnings(caplog)) == 1
    assert "reads back" in caplog.text


class Failing:
    """Something to do in a module, which fails at calls of some numbers."""

    def __init__(self, error: BaseException, *numbers: int) -> None:
        self.error = error
        self.numbers = numbers
        self.calls = 0

    def __call__(self, _hidden: torch.Tensor) -> None:
        self.calls += 1
        if self.calls in self.numbers:
            raise self.error


@pytest.mark.covering
@pytest.mark.parametrize("number", [2, 3], ids=["prepared", "captured"])
@pytest.mark.parametrize("error", [ValueError("no\nsecond line"), torch.OutOfMemoryError("much")])
def test_a_model_that_fails_when_captured_is_launched(
    error: Exception, number: int, model: PreTrainedModel, caplog: pytest.LogCaptureFixture
) -> None:
    with headinfer.attach(model, **SIMULATED, capture=False) as offload:
        wanted = steps(model, prompted(offload, model), 6)
    with headinfer.attach(model, **SIMULATED) as offload:
        cache = prompted(offload, model)
        model.lm_head = Around(model.lm_head, Failing(error, number))
        assert all(map(torch.equal, steps(model, cache, 6), wanted))
        assert offload.stats.captured_steps == 0
    reason = "no;" if isinstance(error, ValueError) else "no GPU memory left for a capture;"
    assert [reason in each for each in warnings(caplog)] == [True]


@pytest.mark.covering
@pytest.mark.parametrize("placement", [{}, {"resident_tokens": 0}], ids=["one launch", "in pieces"])
@pytest.mark.parametrize("error", [RuntimeError("no\nsecond line"), torch.OutOfMemoryError("much")])
@pytest.mark.parametrize("known", [False, True])
def test_a_first_replay_that_fails_leaves_the_step_to_be_launched(
    known: bool,
    error: Exception,
    placement: dict[str, Any],
    model: PreTrainedModel,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fail(capture: SimulatedCapture[Any]) -> None:
        for run in capture._operations[:-1]:
            run()
        raise error

    options = {**SIMULATED, **placement}
    with headinfer.attach(model, **options, capture=False) as offload:
        wanted = steps(model, prompted(offload, model), 12)
    with headinfer.attach(model, **options) as offload:
        if known:
            steps(model, prompted(offload, model, seed=2), 6)
        served = offload.stats.captured_steps
        assert (served > 0) == known
        cache = prompted(offload, model)
        got = steps(model, cache, 1)
        with monkeypatch.context() as patch:
            patch.setattr(SimulatedCapture, "replay", fail)
            got += steps(model, cache, 2, first=1)
        got += steps(model, cache, 9, first=3)
        assert all(map(torch.equal, got, wanted))
        assert cache.get_seq_length() == 40 + 12
        assert offload.stats.captured_steps == served
        assert not cache.state.engine.captured
    reason = "no;" if type(error) is RuntimeError else "no GPU memory left for a capture;"
    assert [reason in each for each in warnings(caplog)] == [True]


def test_an_error_of_the_step_itself_reaches_the_caller(model: PreTrainedModel) -> None:
    with headinfer.attach(model, **SIMULATED) as offload:
        cache = prompted(offload, model)
        steps(model, cache, 5)
        with pytest.raises(IndexError):
            step(model, cache, token=10**6)
        assert step(model, cache).isfinite().all()
        assert offload.stats.captured_steps == 5 - NEW_KIND + 1


def test_an_output_that_cannot_be_copied_is_not_captured(
    model: PreTrainedModel, caplog: pytest.LogCaptureFixture
) -> None:
    class Own:
        def __init__(self, logits: torch.Tensor) -> None:
            self.logits = logits

        def __getitem__(self, name: str) -> torch.Tensor:
            return getattr(self, name)

    def forward(*args: Any, _inner: Any = model.forward, **kwargs: Any) -> Own:
        return Own(_inner(*args, **kwargs).logits)

    model.forward = forward
    stats, _ = with_and_without_capture(model, lambda own: steps(model, prompted(own, model), 5))
    assert stats.captured_steps == 0
    assert "the model's output has a Own in it" in caplog.text


def test_weights_changed_in_place_are_seen_at_once(model: PreTrainedModel) -> None:
    before = model.lm_head.weight.clone()

    def use(offload: Offload) -> list[torch.Tensor]:
        model.lm_head.weight.copy_(before)
        cache, outputs = prompted(offload, model), []
        for _ in range(10):
            outputs.append(step(model, cache))
            model.lm_head.weight.mul_(1.1)
        return outputs

    stats, _ = with_and_without_capture(model, use)
    assert (stats.captures, launched(stats)) == (1, NEW_KIND)


REPLACEMENTS: dict[str, Callable[[torch.nn.Module], Any]] = {
    "parameter": lambda layer: setattr(
        layer.mlp.up_proj, "weight", torch.nn.Parameter(layer.mlp.up_proj.weight * -1, False)
    ),
    "data": lambda layer: setattr(
        layer.mlp.up_proj.weight, "data", layer.mlp.up_proj.weight.data * -1
    ),
    "module": lambda layer: setattr(
        layer.mlp, "up_proj", Around(layer.mlp.up_proj, lambda hidden: hidden * 0.5)
    ),
    "forward": lambda layer: setattr(
        layer.mlp, "forward", lambda hidden, _inner=layer.mlp.forward: _inner(hidden) * 2
    ),
}


@pytest.mark.covering(most=2)
@pytest.mark.parametrize("replace", REPLACEMENTS.values(), ids=REPLACEMENTS)
def test_what_is_replaced_between_turns_is_captured_anew(
    replace: Callable[[torch.nn.Module], Any], caplog: pytest.LogCaptureFixture
) -> None:
    outcomes = []
    for capture in (False, True):
        model = tiny_model("llama3")
        with headinfer.attach(model, **SIMULATED, capture=capture) as offload:
            cache, tokens, logits = offload.new_cache(), random_tokens(1, 30), []
            for _ in range(4):
                output = generated(model, tokens, cache, max_new_tokens=10)
                tokens = torch.cat((output.sequences, random_tokens(1, 9)), dim=1)
                logits += [*output.logits]
                replace(model.model.layers[1])
            other = generated(model, random_tokens(1, 30), offload.new_cache(), max_new_tokens=10)
            outcomes.append([*logits, *other.logits])
    assert all(map(torch.equal, *outcomes))
    # Compared in vain, prepared, compared: in each turn but the first.
    assert launched(offload.stats) == few(30, 9) + 3 * 3 + few(30, 9, begin=NEW_CACHE)
    assert offload.stats.captures == 4 + 1
    assert warnings(caplog) == []


def test_arguments_that_are_others_in_each_call_are_given_up(
    model: PreTrainedModel, caplog: pytest.LogCaptureFixture
) -> None:
    def use(offload: Offload) -> list[torch.Tensor]:
        cache = prompted(offload, model)
        outputs = steps(model, cache, 5)
        for at in range(20):
            outputs.append(step(model, cache, logits_to_keep=1 + at))
        return outputs + steps(model, cache, 5)

    stats, _ = with_and_without_capture(model, use)
    assert (stats.captures, stats.captured_steps) == (1 + 8, 5 - NEW_KIND + 5 - NEW_TURN)
    assert ["others in each call" in each for each in warnings(caplog)] == [True]


@pytest.mark.slow
def test_places_are_noted_anew_where_a_window_began_anew_beside_the_calls() -> None:
    """Layers called by themselves add tokens, which are taken back: as many as before remain."""
    model = tiny_model("gemma3")
    outcomes = []
    for capture in (False, True):
        with headinfer.attach(model, **SIMULATED, capture=capture) as offload:
            found = []
            for done in range(78, 84):
                cache = offload.new_cache()
                model(random_tokens(1, 240), **cache_argument(model, cache))
                found += steps(model, cache, done)
                model.model(random_tokens(1, 30), **cache_argument(model, cache))
                cache.crop(-30)
                found += steps(model, cache, 3)
            outcomes.append(found)
    assert all(map(torch.equal, *outcomes))


def test_steps_begun_in_inference_mode_go_on_outside_it(model: PreTrainedModel) -> None:
    with headinfer.attach(model, **SIMULATED) as offload:
        with torch.inference_mode():
            cache = prompted(offload, model)
            steps(model, cache, 4)
        with torch.no_grad():
            steps(model, cache, 4)
        assert offload.stats.captured_steps > 0
