"""Captures that end: with their cache, by detaching, or half-way."""

import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import headinfer
from captured import NEW_KIND, SIMULATED, launched, prompted, steps
from headinfer.device.simulated import SimulatedDevice
from headinfer.engine.engine import Engine
from headinfer.engine.pages import Pages
from headinfer.engine.ready import StepMemory
from headinfer.errors import CacheStateError, MemoryPlanError
from headinfer.integration.calls import cache_argument
from headinfer.kv.ledger import Ledger
from parted import spread
from tiny_models import random_tokens, shared_model, tiny_model


@pytest.fixture
def no_collection() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def drop(caches: list[Any]) -> None:
    caches.clear()


def close(caches: list[Any]) -> None:
    caches[0].close()


def detach(caches: list[Any]) -> None:
    caches[0].state.host.detach()


@pytest.mark.covering
@pytest.mark.usefixtures("no_collection")
@pytest.mark.parametrize("end", [drop, close, detach])
@pytest.mark.parametrize("name", ["llama3", "gemma3"])
def test_memory_is_freed_at_once(name: str, end: Callable[[list[Any]], None]) -> None:
    model, device = shared_model(name), SimulatedDevice()
    with headinfer.attach(model, **SIMULATED, simulated_device=device) as offload:
        caches = [prompted(offload, model)]
        steps(model, caches[0], 6)
        assert launched(offload.stats) == NEW_KIND
        captured = next(iter(caches[0].state.engine.captured.values()))
        static = weakref.ref(captured.step.arguments["input_ids"])
        del captured
        assert device.allocated_bytes > 0
        end(caches)
        assert device.allocated_bytes == 0
        assert static() is None


@pytest.mark.usefixtures("no_collection")
def test_a_model_goes_with_its_captures() -> None:
    model = tiny_model("llama3")
    gone = weakref.ref(model.lm_head.weight)
    offload = headinfer.attach(model, **SIMULATED)
    cache = prompted(offload, model)
    steps(model, cache, 6)
    offload.detach()
    del model, cache, offload
    gc.collect()  # transformers' own models are cycles
    assert gone() is None


def test_a_detached_model_is_as_before() -> None:
    model = tiny_model("llama3")
    attributes, wanted = set(vars(model)), model(random_tokens(1, 20)).logits
    with headinfer.attach(model, **SIMULATED) as offload:
        cache = prompted(offload, model)
        steps(model, cache, 6)
    assert set(vars(model)) == attributes
    assert torch.equal(model(random_tokens(1, 20)).logits, wanted)
    with (
        pytest.raises(CacheStateError, match=r"closed|another"),
        headinfer.attach(model, **SIMULATED),
    ):
        steps(model, cache, 1)


@pytest.mark.usefixtures("no_collection")
def test_weights_stay_where_a_capture_reads_them_until_the_next_turn() -> None:
    model = tiny_model("llama3")
    with headinfer.attach(model, **SIMULATED) as offload:
        cache = prompted(offload, model)
        steps(model, cache, 5)
        memory = weakref.ref(model.lm_head.weight.untyped_storage())
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight * 2, False)
        steps(model, cache, 2)
        assert memory() is not None, "it was freed under the capture"
        model(random_tokens(1, 3), **cache_argument(model, cache))
        steps(model, cache, 1)
        assert memory() is None


class Interrupted(torch.nn.Module):
    """A module that is interrupted in its call of a number."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.left = 0

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt
        return self.inner(hidden)


STAGES = {"prepared": (1, 1), "captured": (1, 2), "first by kernel": (1, 3), "compared": (2, 1)}
"""How many steps were served before, and which of the calls within the next one breaks off."""


@pytest.mark.covering
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("layer", [0, 2])
@pytest.mark.parametrize("name", ["llama3", "gemma3"])
def test_ctrl_c_within_a_call_of_the_model(name: str, layer: int, stage: str) -> None:
    model, (served, number) = tiny_model(name), STAGES[stage]
    module = Interrupted(model.model.layers[layer].mlp)
    model.model.layers[layer].mlp = module
    with headinfer.attach(model, **SIMULATED, capture=False) as offload:
        wanted = steps(model, prompted(offload, model), 12)
    with headinfer.attach(model, **SIMULATED) as offload:
        cache = prompted(offload, model)
        got = steps(model, cache, served)
        module.left = number
        with pytest.raises(KeyboardInterrupt):
            steps(model, cache, 1, first=served)
        if stage in ("first by kernel", "compared"):  # as where nothing is captured
            with pytest.raises(CacheStateError, match="interrupted"):
                steps(model, cache, 1)
            cache.reset()
            cache = prompted(offload, model)
            got = []
        got += steps(model, cache, 12 - len(got), first=len(got))
        assert all(map(torch.equal, got, wanted))
        assert offload.stats.captured_steps > 0


@pytest.mark.covering(most=5)
@pytest.mark.parametrize(
    ("owner", "method", "number", "goes_on", "layers"),
    [
        (Engine, "begin_step", 1, True, (0, 0, 0)),
        (StepMemory, "write", 1, False, (0, 0, 0)),  # when the token is counted
        (Pages, "state_token", 2, True, (0, 0, 0)),
        (Engine, "end_step", 1, True, (0, 0, 0)),
        (Ledger, "extend", 1, True, (0, 0, 0)),
        (Ledger, "extend", 2, False, (0, 0, 0)),
        (Engine, "begin_step", 2, True, (0, 1, 1)),
        (Engine, "replaying", 2, True, (0, 1, 1)),
        (Pages, "state_token", 2, True, (0, 1, 1)),
        (Engine, "end_step", 1, True, (0, 1, 1)),
        (Engine, "end_step", 2, False, (0, 1, 1)),
    ],
)
def test_ctrl_c_around_a_replay(
    owner: type,
    method: str,
    number: int,
    goes_on: bool,
    layers: tuple[int, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = shared_model("llama3")
    with headinfer.attach(model, **SIMULATED, capture=False) as offload:
        wanted = steps(model, prompted(offload, model), 80)
    with headinfer.attach(model, **SIMULATED, simulated_device=spread(*layers)) as offload:
        cache = prompted(offload, model)
        got = steps(model, cache, 6)
        with monkeypatch.context() as patch:
            original, left = getattr(owner, method), [number]

            def broken_off(*args: Any, **options: Any) -> Any:
                left[0] -= 1
                if left[0] == 0:
                    raise KeyboardInterrupt
                return original(*args, **options)

            patch.setattr(owner, method, broken_off)
            with pytest.raises(KeyboardInterrupt):
                steps(model, cache, 1, first=6)
        if not goes_on:
            with pytest.raises(CacheStateError, match="interrupted"):
                steps(model, cache, 1)
            cache.reset()
            cache, got = prompted(offload, model), []
        got += steps(model, cache, 80 - len(got), first=len(got))
        assert all(map(torch.equal, got, wanted))


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("much"), MemoryPlanError("none left"), RuntimeError("no")]
)
def test_what_fails_after_a_replay_leaves_its_result(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = shared_model("llama3")
    with headinfer.attach(model, **SIMULATED, capture=False) as offload:
        wanted = steps(model, prompted(offload, model), 80)
    with headinfer.attach(model, **SIMULATED) as offload:
        cache = prompted(offload, model)
        got = steps(model, cache, 6)
        failures = [1, 2]  # after the replay, and before the next one

        def fail(*_args: Any) -> None:
            failures.pop()
            raise error

        with monkeypatch.context() as patch:
            patch.setattr(StepMemory, "write", fail)
            got += steps(model, cache, 1, first=6)
            assert len(failures) == 1
            with pytest.raises(type(error), match=str(error)):
                steps(model, cache, 1, first=7)
            assert failures == []
        assert cache.get_seq_length() == 40 + 7
        got += steps(model, cache, 73, first=7)
        assert all(map(torch.equal, got, wanted))


def test_ctrl_c_as_a_page_goes_home(monkeypatch: pytest.MonkeyPatch) -> None:
    model = shared_model("llama3")
    with headinfer.attach(model, **SIMULATED, capture=False) as offload:
        wanted = steps(model, prompted(offload, model), 90)
    with headinfer.attach(model, **SIMULATED) as offload:
        cache = prompted(offload, model)

        def broken_off(*_args: Any, **_options: Any) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(type(cache.state.engine._pages), "_send", broken_off)
        with pytest.raises(KeyboardInterrupt):
            steps(model, cache, 90)
        monkeypatch.undo()
        with pytest.raises(CacheStateError, match="interrupted"):
            steps(model, cache, 1)
        cache.reset()
        assert all(map(torch.equal, steps(model, prompted(offload, model), 90), wanted))
