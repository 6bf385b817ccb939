"""Decode steps of layers on several devices, all of them in one capture."""

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import headinfer
from captured import NEW_KIND, few, generated, launched, prompted, steps, stock_generated
from headinfer.device.simulated import SimulatedDevice
from headinfer.engine.balance import Settled
from headinfer.engine.flagged import FlaggedHost
from headinfer.engine.one_launch_share import StepTimes
from headinfer.engine.ready import Form
from headinfer.integration.crossing import Crossings
from headinfer.integration.placement import Placement
from headinfer.offload import Offload
from headinfer.schedule import route
from parted import spread
from tiny_models import random_tokens, shared_model, tiny_model

PLACEMENTS: dict[str, tuple[Form, dict[str, Any]]] = {
    "resident": (Form.ONE_LAUNCH, {"resident_tokens": "all"}),
    "streamed": (
        Form.STREAMED,
        {"resident_tokens": 0, "tile_heads": 1, "tile_tokens": 48, "chunk_tokens": 16},
    ),
    "both": (
        Form.STREAMED,
        {
            "resident_tokens": 9,
            "host_attention": 0.5,
            "tile_heads": 2,
            "tile_tokens": 16,
            "chunk_tokens": 16,
        },
    ),
    "in turn": (
        Form.IN_PIECES,
        {"resident_tokens": 9, "overlap": False, "tile_tokens": 48, "chunk_tokens": 16},
    ),
}


@pytest.fixture(autouse=True)
def _few_tokens_are_steady(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have what is streamed stay for a while though there are few tokens in a test."""
    monkeypatch.setattr(route, "STEADY_TOKENS", 48)
    monkeypatch.setattr(route, "_STEADY_FROM", 0)


def forms(cache: Any) -> set[Form]:
    """Return the forms in which a cache's steps are captured."""
    return {form for _, form in cache.state.engine.captured}


def attached(model: Any, *layers: int, **options: Any) -> Offload:
    """Return an attachment with a simulated device for each layer; the caller detaches it."""
    return headinfer.attach(model, device="simulated", simulated_device=spread(*layers), **options)


@pytest.mark.covering(most=2)
@pytest.mark.parametrize("layers", [pytest.param((0, 1, 1), marks=pytest.mark.slow), (1, 0, 2)])
@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("name", ["llama3", "gemma3"])
def test_generate_equals_launched_steps_and_stock(
    name: str, placement: str, layers: tuple[int, ...]
) -> None:
    """Pages fill, windows begin anew, and the host's share grows, on each device by itself."""
    model, tokens, new_tokens = shared_model(name), random_tokens(1, 70), 70
    layers += layers[-1:] * (len(model.model.layers) - len(layers))
    form, options = PLACEMENTS[placement]
    results = []
    for capture in (False, True):
        with attached(model, *layers, capture=capture, **options) as offload:
            cache = offload.new_cache()
            results.append(generated(model, tokens, cache, max_new_tokens=new_tokens))
            stats = offload.stats
            assert (form in forms(cache)) == capture
        assert (stats.captures > 0) == capture
    again = stats.captures + 2  # in pieces, until another capture is due
    assert few(70, new_tokens - 1) <= launched(stats) <= few(70, new_tokens - 1) + again
    eager, ours = results
    assert all(map(torch.equal, eager.logits, ours.logits))
    assert torch.equal(ours.sequences, stock_generated(model, tokens, max_new_tokens=70).sequences)


@pytest.mark.slow
def test_each_device_corrects_the_share_that_its_steps_tell_of(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Another capture comes for a change on any of them, though the others have had theirs."""
    hosts: list[FlaggedHost] = []

    def times(host: FlaggedHost) -> StepTimes | None:
        ran, host._replayed = host._replayed, False
        if host not in hosts:
            hosts.append(host)
        return StepTimes(1.0, 0.2 if host is hosts[0] else 0.0, 0.0) if ran else None

    monkeypatch.setattr(FlaggedHost, "times", times)
    model, tokens = shared_model("llama3"), random_tokens(1, 71)
    wanted = stock_generated(model, tokens, max_new_tokens=60).sequences
    with attached(model, 0, 1, 1, **PLACEMENTS["both"][1]) as offload:
        cache = offload.new_cache(200)
        model(tokens[:, :70], past_key_values=cache)
        balances = [part._balances.at(1) for part in cache.state.engine.parts]
        for each in balances:
            each.fixed, each._settled = False, Settled(0.3, host_s=1.0)
        assert torch.equal(generated(model, tokens, cache, max_new_tokens=60).sequences, wanted)
        assert [each.changes for each in balances] == [4, 0]
        assert balances[0].share > 1.5 * balances[1].share
        assert offload.stats.captures >= 5
        assert launched(offload.stats) < 2 * 5 + few(71, 60)


@pytest.mark.slow
def test_devices_differ_in_what_they_stream() -> None:
    """One has all tokens on it, and the other takes as many tiles as are left."""
    model, outcomes = shared_model("llama3"), []
    for capture in (False, True):
        with attached(
            *(model, 0, 1, 1),
            **{"device_memory": "4MiB,1200KiB", "tile_tokens": 48, "chunk_tokens": 16},
            capture=capture,
            host_attention="off",
        ) as offload:
            cache = offload.new_cache(1500)
            model(random_tokens(1, 1000), past_key_values=cache)
            first, second = cache.state.engine.parts
            assert first.plan.resident_tokens > 1000 > second.plan.resident_tokens
            outcomes.append(steps(model, cache, 40))
            assert (Form.STREAMED in forms(cache)) == capture
            assert first._streaming is None  # whose share of the host need not settle, either
            assert (second._streaming is not None) == capture
    assert all(map(torch.equal, *outcomes))
    assert launched(offload.stats) < 12


@pytest.mark.parametrize("part", [0, 1])
def test_captures_go_with_the_memory_of_any_device(part: int) -> None:
    model = shared_model("llama3")
    with attached(model, 0, 1, 1, resident_tokens="all") as offload:
        cache = prompted(offload, model)
        steps(model, cache, 5)
        assert forms(cache) == {Form.ONE_LAUNCH}
        cache.state.engine.parts[part].give_up_residents()
        assert not cache.state.engine.captured
        steps(model, cache, 5)
        assert forms(cache) == {Form.STREAMED}


def test_weights_that_were_exchanged_on_another_device_are_seen() -> None:
    model, outcomes = tiny_model("llama3"), []
    with attached(model, 0, 1, 1, resident_tokens="all") as offload:
        cache = prompted(offload, model)
        steps(model, cache, 6)
        layer = model.model.layers[2].mlp.down_proj
        layer.weight = torch.nn.Parameter(layer.weight * 1.5, requires_grad=False)
        cache.crop(-6)
        model(random_tokens(1, 2), past_key_values=cache)
        before = offload.stats.captured_steps
        outcomes.append(steps(model, cache, 8))
        assert offload.stats.captured_steps > before
    with attached(model, 0, 1, 1, resident_tokens="all", capture=False) as offload:
        cache = prompted(offload, model)
        model(random_tokens(1, 2), past_key_values=cache)
        outcomes.append(steps(model, cache, 8))
    assert all(map(torch.equal, *outcomes))


@pytest.mark.covering
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("placement", ["resident", "both", "in turn"])
def test_a_capture_that_fails_leaves_all_devices_as_before(
    placement: str, error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, devices = shared_model("llama3"), spread(0, 1, 1)
    _, options = PLACEMENTS[placement]
    model_forward, calls = model.model.layers[2].mlp.forward, []

    def failing(*args: Any) -> torch.Tensor:
        calls.append(devices[1].recorder)
        if calls[-1] is not None:
            raise error("no capture")
        return model_forward(*args)

    with headinfer.attach(
        model, device="simulated", simulated_device=devices, capture=False, **options
    ) as offload:
        wanted = steps(model, prompted(offload, model), NEW_KIND + 3)
    with headinfer.attach(
        model, device="simulated", simulated_device=devices, **options
    ) as offload:
        cache = prompted(offload, model)
        with monkeypatch.context() as patch:
            patch.setitem(model.model.layers[2].mlp.__dict__, "forward", failing)
            found = steps(model, cache, 1)
            if error is KeyboardInterrupt:
                with pytest.raises(KeyboardInterrupt):
                    steps(model, cache, 1, first=1)
            else:
                found += steps(model, cache, 1, first=1)
        assert any(calls)
        assert all(device.recorder is None for device in devices)
        found += steps(model, cache, NEW_KIND + 3 - len(found), first=len(found))
        assert all(map(torch.equal, found, wanted))
    for device in devices:
        device.memory.check()


@pytest.mark.slow
def test_rows_are_rearranged_between_captured_steps() -> None:
    model, outcomes = shared_model("llama3"), []
    for capture in (False, True):
        with attached(model, 0, 1, 1, capture=capture, **PLACEMENTS["both"][1]) as offload:
            cache = prompted(offload, model, rows=2)
            new = {"input_ids": torch.tensor([[5], [7]])}
            found = steps(model, cache, 8, **new)
            cache.reorder_cache(torch.tensor([1, 0]))
            found += steps(model, cache, 8, **new)
            cache.crop(-3)
            outcomes.append([*found, *steps(model, cache, 8, **new)])
    assert all(map(torch.equal, *outcomes))
    assert offload.stats.captured_steps > 8


@pytest.mark.parametrize("ends", ["cpu", "disk"])
def test_steps_whose_weights_are_brought_are_launched_which_is_said_once(
    ends: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    accelerate = pytest.importorskip("accelerate")
    model = tiny_model("llama3")
    places: dict[str, str] = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu"}
    places |= {f"model.layers.{at}": "cpu" for at in range(3)}
    places |= {"model.norm": "cpu", "lm_head": "cpu"}
    if ends == "disk":
        places["model.layers.1"] = "disk"
    model = accelerate.dispatch_model(
        model, places, main_device="cpu", offload_dir=str(tmp_path), force_hooks=True
    )
    with caplog.at_level(logging.INFO), attached(model, 0, 1, 1, resident_tokens="all") as offload:
        for _ in range(2):
            steps(model, prompted(offload, model), NEW_KIND + 3)
    said = [text for text in caplog.messages if "kernel by kernel" in text]
    brought = "accelerate brings some of its weights to where they are used"
    assert said == [
        f"decode steps of this model are launched kernel by kernel: {brought}",
    ] * (ends == "disk")
    assert (offload.stats.captured_steps > 0) == (ends == "cpu")


def test_every_device_with_weights_has_a_part_in_a_capture() -> None:
    first, second = torch.device("cuda", 0), torch.device("cuda", 1)
    both = dict.fromkeys((first, second), 2**20)
    spread_out = Placement(layers=(first, second), weights_bytes=both, brought_bytes={})
    assert spread_out.obstacle is None
    head_apart = Placement(layers=(first, first), weights_bytes=both, brought_bytes={})
    assert head_apart.obstacle == "some of its weights are on a device that has no layer"


def test_devices_of_two_kinds_capture_nothing_together() -> None:
    with pytest.raises(AssertionError, match="one kind"):
        SimulatedDevice().capture(lambda: None, object())  # type: ignore[arg-type]


def test_what_layers_share_crosses_once_in_a_captured_step(monkeypatch: pytest.MonkeyPatch) -> None:
    model, entered = shared_model("llama3"), []
    once = Crossings.once

    @contextlib.contextmanager
    def noted(crossings: Crossings, *, discards: bool) -> Iterator[None]:
        with once(crossings, discards=discards):
            entered.append((discards, devices[1].recorder is not None))
            yield

    monkeypatch.setattr(Crossings, "once", noted)
    devices = spread(0, 1, 1)
    with headinfer.attach(
        model, device="simulated", simulated_device=devices, resident_tokens="all"
    ) as offload:
        cache = prompted(offload, model)
        entered.clear()  # of the prompt
        steps(model, cache, NEW_KIND + 2)
    assert entered == [(False, False), (False, True)]  # as it is run, and as it is captured
