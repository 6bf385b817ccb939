"""Devices that layers are spread over pack at the same time: the thread waits for none too long."""

from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import headinfer
from headinfer.device.simulated import SimulatedDevice
from headinfer.engine.engine import Engine
from headinfer.plan import raw_room
from tiny_models import random_tokens, tiny_model

CHUNK, LAYERS, CHUNKS = 256, 8, 6
SIZES: dict[str, Any] = {"tile_heads": 2, "tile_tokens": 512, "chunk_tokens": CHUNK}
_LAUNCH = 0.05
"""What the thread takes for a layer of a chunk, over what a device takes for it."""


class Clock:
    """A clock of the launching thread, and of the layer that was launched last."""

    now = layer_done = 0.0


class Reached:
    """A mark behind what a device has to do so far."""

    def __init__(self, clock: Clock, at: float) -> None:
        self._clock, self._at = clock, at

    @property
    def reached(self) -> bool:
        return self._clock.now >= self._at

    def wait(self) -> None:
        self._clock.now = max(self._clock.now, self._at)


class TimedDevice(SimulatedDevice):
    """A simulated device that takes as long for each layer of a chunk, by a clock of its own."""

    def __init__(self, clock: Clock, seed: int) -> None:
        super().__init__(seed=seed)
        self.clock, self.done, self.is_first = clock, 0.0, not seed

    def mark_compute(self) -> Reached:
        return Reached(self.clock, self.done)

    def launch_layer(self, *, first: bool) -> None:
        """Begin once it is launched, the device has nothing before, and the layer its input."""
        clock = self.clock
        clock.now += _LAUNCH
        clock.layer_done = 0.0 if first else clock.layer_done
        self.done = clock.layer_done = max(clock.now, self.done, clock.layer_done) + 1


@pytest.fixture(autouse=True)
def _layers_take_time(monkeypatch: pytest.MonkeyPatch) -> None:
    attend = Engine.attend

    def timed(engine: Engine, layer_idx: int, *args: Any, **options: Any) -> torch.Tensor:
        device: Any = engine.device
        device.launch_layer(first=device.is_first and not layer_idx)
        return attend(engine, layer_idx, *args, **options)

    monkeypatch.setattr(Engine, "attend", timed)


def small_model(layers: int) -> PreTrainedModel:
    return tiny_model(
        "llama3", num_hidden_layers=layers, num_key_value_heads=2, num_attention_heads=2
    ).to(torch.bfloat16)


def prefill_layers(devices: int, kv_cache: str) -> float:
    """Return how long a prompt takes, in the time of one layer of a chunk."""
    model, clock = small_model(LAYERS * devices), Clock()
    each = [TimedDevice(clock, seed) for seed in range(devices)]
    with headinfer.attach(
        model,
        device="simulated",
        simulated_device=[device for device in each for _ in range(LAYERS)],
        kv_cache=kv_cache,
        resident_tokens=0,
        **SIZES,
    ) as offload:
        cache = offload.new_cache()
        model(random_tokens(1, CHUNK * CHUNKS), past_key_values=cache, logits_to_keep=1)
    return each[-1].done


@pytest.mark.covering(most=2)
@pytest.mark.parametrize(("devices", "lead"), [(1, 2), (2, 2), (3, 2), (3, 8)])
def test_no_device_idles_while_the_thread_waits_for_what_another_has_packed(
    devices: int, lead: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(raw_room, "_LEAD_TOKENS", lead * CHUNK)
    least = (CHUNKS - 1 + devices) * LAYERS
    dense = prefill_layers(devices, "dense")
    assert least < dense < 1.05 * least
    assert prefill_layers(devices, "packed") < 1.02 * dense


def spreading_model() -> PreTrainedModel:
    """Return a model whose keys and values have more exponents than a page has codes for."""
    model = small_model(3)
    with torch.no_grad():
        for layer in model.model.layers:
            attention: Any = layer.self_attn
            dims = torch.arange(attention.head_dim).repeat(2)
            wide = torch.ldexp(torch.ones(len(dims)), 3 * dims - 24)[:, None].bfloat16()
            attention.k_proj.weight.mul_(wide)
            attention.v_proj.weight.mul_(wide)
    return model


@pytest.mark.covering(most=2)
@pytest.mark.parametrize("where", [(0, 0, 0), (0, 1, 1), (0, 1, 2), (1, 0, 1)])
def test_pages_that_do_not_pack_anywhere_give_the_bits_of_dense_ones(
    where: tuple[int, ...],
) -> None:
    model, prompt, outcomes = spreading_model(), random_tokens(1, 475), []
    for kv_cache in ("dense", "packed"):
        clock = Clock()
        devices = {number: TimedDevice(clock, number) for number in sorted(set(where))}
        with headinfer.attach(
            model,
            device="simulated",
            simulated_device=[devices[number] for number in where],
            kv_cache=kv_cache,
            resident_tokens=0,
            chunk_tokens=64,
            tile_tokens=64,
        ) as offload:
            cache = offload.new_cache(500)
            outputs = [
                model(part, past_key_values=cache, logits_to_keep=5).logits
                for part in prompt.split([450, 10, 15], 1)
            ]
            outputs += [layer.values for layer in cache.layers]
            room = offload.plan.raw_page_bytes
            taken = cache.state.engine.host_kv_bytes - offload.plan.shape.host_kv_bytes(500)
            outcomes.append(outputs)
    assert 0 < room < taken  # more blocks than were set aside
    assert all(output.isfinite().all() for output in outcomes[0])
    assert all(map(torch.equal, *outcomes))
