"""The engine's part in captured steps: what is done between replays, and in which order."""

import copy
from typing import Any

import pytest
import torch

import headinfer
from captured import NEW_CACHE, SIMULATED, few, launched, prompted, step, steps
from headinfer.attend.masks import Padding
from headinfer.attend.select import select_kernels
from headinfer.device.base import CaptureError, Edge
from headinfer.device.hazards import HazardError
from headinfer.device.simulated import SimulatedDevice
from headinfer.engine.engine import Engine
from headinfer.engine.ready import Form
from headinfer.engine.stats import Stats
from headinfer.errors import CacheStateError
from headinfer.plan.options import Options
from headinfer.plan.resolve import resolve
from shapes import model_shape
from tiny_models import shared_model

EDGES = {Edge.PAGE_WRITTEN, Edge.MEMORY_FREE, Edge.TILE_FILLED, Edge.HOST_SETTLED}
"""Waits around steps whose tokens are all resident."""


def exercise(device: SimulatedDevice, *, capture: bool = True) -> torch.Tensor:
    """Decode past pages in a cache and in copies of it, which are filled by copy-in."""
    model = shared_model("gemma3")
    options = {**SIMULATED, "simulated_device": device, "capture": capture}
    with headinfer.attach(model, **options) as offload:
        cache = prompted(offload, model)
        outputs = steps(model, cache, 70)
        copied = copy.deepcopy(cache)
        outputs += steps(model, copied, 3)
        cache.crop(-4)
        for at in range(70):
            outputs += [step(model, cache, 3 + at), step(model, copied, 4 + at)]
        cache.close()
        outputs += steps(model, copied, 3)
        if capture:
            again = 2  # at 128 tokens, in both
            assert launched(offload.stats) == few(40, 70) + NEW_CACHE + again
    del cache, copied
    device.memory.check()
    return torch.stack(outputs)


@pytest.mark.parametrize(
    "seeds", [range(1), pytest.param(range(1, 4), marks=pytest.mark.slow)], ids=["one", "others"]
)
def test_all_seeds_give_the_same_bits(seeds: range) -> None:
    wanted = exercise(SimulatedDevice(), capture=False)
    assert wanted.isfinite().all()
    for seed in seeds:
        device = SimulatedDevice(seed=seed)
        assert torch.equal(exercise(device), wanted)
        assert device.exercised_edges == EDGES


# `MEMORY_FREE` is in no danger: the host waits for compute before a copied cache is filled.
@pytest.mark.parametrize("edge", [Edge.PAGE_WRITTEN, Edge.TILE_FILLED, Edge.HOST_SETTLED])
def test_a_missing_wait_around_replays_is_noticed(edge: Edge) -> None:
    with pytest.raises(HazardError, match="is not ordered after the"):
        exercise(SimulatedDevice(seed=1, skip=[edge]))


Token = list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]
"""Query, keys and values of a token, for each layer."""


def engine_with(tokens: int, **options: Any) -> Engine:
    """Return an engine of a layer with a window of 5 and a full one, with tokens in both."""
    options = Options.parse(**{"resident_tokens": "all", **options})
    shape = model_shape(window_tokens=5)
    plan = resolve(shape, options, device="simulated", batch=2, context_tokens=1000)
    engine = Engine(SimulatedDevice(), plan, torch.float32, Stats())
    for _ in range(tokens):
        attend(engine, a_token())
    return engine


def a_token(tokens: int = 1) -> Token:
    return [
        (torch.randn(2, 4, tokens, 8), *(torch.randn(2, 2, tokens, 8) for _ in range(2)))
        for _ in range(2)
    ]


def attend(engine: Engine, token: Token, **options: Any) -> torch.Tensor:
    """Pass a token through both layers."""
    kernels = select_kernels(torch.device("cpu"), torch.float32, 8, 8)
    windows = [layer.window_tokens or None for layer in engine.plan.shape.layers]
    return torch.stack(
        [
            engine.attend(
                *(layer_idx, *token[layer_idx]),
                **{"kernels": kernels, "scale": 0.3, "window_tokens": windows[layer_idx]},
                **options,
            )
            for layer_idx in range(2)
        ]
    )


def test_steps_between_begin_and_end_are_those_of_calls() -> None:
    torch.manual_seed(0)
    captured, called = engine_with(0), engine_with(0)
    token = a_token()
    attend(captured, token)
    attend(called, token)
    token = a_token()
    pieces = captured.begin_step()

    def work() -> torch.Tensor:
        with captured.capturing(Form.ONE_LAUNCH):
            return attend(captured, token)

    capture = captured._device.capture(work)
    for _ in range(200):  # past pages, and past restarts of the window
        for parts, new in zip(token, a_token(), strict=True):
            for part, values in zip(parts, new, strict=True):
                part.copy_(values)
        assert captured.begin_step() == pieces
        assert torch.equal(capture.replay(), attend(called, token))
        captured.end_step(Form.ONE_LAUNCH)
        assert captured.lengths() == called.lengths()
    for layer_idx in range(2):
        assert torch.equal(captured.read(layer_idx, "keys"), called.read(layer_idx, "keys"))
    assert captured._stats.bytes_to_host == called._stats.bytes_to_host > 0


def test_beginning_alone_changes_nothing() -> None:
    torch.manual_seed(0)
    begun, other = engine_with(70), engine_with(0)
    torch.manual_seed(0)
    for _ in range(70):
        attend(other, a_token())
    token = a_token()
    assert begun.begin_step() == begun.begin_step()
    assert begun.lengths() == [70, 70]
    assert torch.equal(attend(begun, token), attend(other, token))


def test_what_is_not_resident_takes_more_than_a_launch() -> None:
    engine = engine_with(3, resident_tokens=0, host_attention="off")
    assert engine.begin_step() is None
    assert engine.lengths() == [3, 3]
    assert attend(engine, a_token()).isfinite().all()


@pytest.mark.parametrize("form", Form)
def test_only_one_token_that_is_no_padding_can_be_captured(form: Form) -> None:
    engine = engine_with(3)
    engine.begin_step()
    padding = Padding.of(torch.tensor([[False, True, True, True], [True] * 4]))
    for token, options in ((a_token(2), {}), (a_token(), {"padding": padding})):
        with engine.capturing(form), pytest.raises(CaptureError, match="masks tokens by itself"):
            attend(engine, token, **options)
    assert engine.lengths() == [3, 3]


def test_a_closed_engine_begins_no_step() -> None:
    engine = engine_with(3)
    engine.close()
    with pytest.raises(CacheStateError, match="closed"):
        engine.begin_step()


def test_captures_go_with_the_memory_they_read() -> None:
    for change, kept in (
        (lambda engine: engine.clear(), False),
        (lambda engine: engine.replan(engine.plan), False),
        (lambda engine: engine.give_up_residents(), False),
        (lambda engine: engine.close(), False),
        (lambda engine: engine.crop(1, 2), True),
        (lambda engine: engine.select(1, [1, 0]), True),
    ):
        engine = engine_with(3)
        engine.begin_step()
        engine.captured["step"] = object()
        change(engine)
        assert ("step" in engine.captured) == kept
