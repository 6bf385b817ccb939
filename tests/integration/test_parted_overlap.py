"""Devices that layers are spread over work at the same time: nothing holds one up for another."""

from typing import Any

import pytest
import torch

import headinfer
from headinfer.device.simulated import SimulatedDevice
from headinfer.device.simulated_event import SimulatedEvent
from headinfer.engine.engine import Engine
from headinfer.integration.calls import cache_argument
from headinfer.plan.memory import STAGING_BUFFERS
from tiny_models import random_tokens, shared_model

SMALL: dict[str, Any] = {"tile_heads": 1, "tile_tokens": 20, "chunk_tokens": 16}


class Waited:
    """A mark that is reached once the host waits for it."""

    reached = False

    def __init__(self, log: list[str], name: str) -> None:
        self._log, self._name = log, name

    def wait(self) -> None:
        self._log.append(f"wait for chunk {self._name}")


class LoggingDevice(SimulatedDevice):
    """A simulated device that tells when the host waits for it, and what it fetches."""

    def __init__(self, name: str, log: list[str]) -> None:
        super().__init__(seed=len(name))
        self._name, self._log, self._marks = name, log, 0
        copy = self.copy_in.copy

        def logged(destination: torch.Tensor, source: torch.Tensor) -> None:
            log.append(f"{name} fetches")
            copy(destination, source)

        self.copy_in.copy = logged  # type: ignore[method-assign]

    def mark_compute(self) -> Waited:
        self._marks += 1
        return Waited(self._log, str(self._marks))

    def finish_compute(self) -> None:
        self._log.append("wait for the call")
        super().finish_compute()

    def synchronize(self) -> None:
        self._log.append("wait for all")
        super().synchronize()


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a log of layers, by their devices, and of all that the host waits for."""
    told: list[str] = []
    attend, synchronize = Engine.attend, SimulatedEvent.synchronize

    def logged(engine: Engine, *args: Any, **options: Any) -> torch.Tensor:
        told.append(f"{engine._device._name} attends")  # type: ignore[attr-defined]
        return attend(engine, *args, **options)

    def waiting(event: SimulatedEvent, edge: Any) -> None:
        told.append(f"wait for {edge.name}")
        synchronize(event, edge)

    monkeypatch.setattr(Engine, "attend", logged)
    monkeypatch.setattr(SimulatedEvent, "synchronize", waiting)
    return told


def test_tiles_of_each_device_are_on_their_way_before_a_step_comes_to_it(log: list[str]) -> None:
    model, tokens = shared_model("llama3"), random_tokens(1, 150)
    fetched = []
    for overlap in (True, False):
        first, second = LoggingDevice("A", log), LoggingDevice("B", log)
        with headinfer.attach(
            model,
            device="simulated",
            simulated_device=[first, second, second],
            overlap=overlap,
            **SMALL,
        ) as offload:
            cache = offload.new_cache(300)
            model(tokens, **cache_argument(model, cache))
            assert cache.layers[0].keys.shape == cache.layers[1].keys.shape  # none is ahead now
            log.clear()
            model(tokens[:, :1], **cache_argument(model, cache))
            assert log.index("A attends") < log.index("B attends")
            fetched.append([log.count(f"{name} fetches") for name in "AB"])
            log.clear()
            model(tokens[:, 1:2], **cache_argument(model, cache))
            ahead = [f"{name} fetches" not in log[: log.index(f"{name} attends")] for name in "AB"]
            assert ahead == [True, True]
    needed = [2 * layers * 4 * -(-150 // 20) for layers in (1, 2)]  # keys and values of each head
    assert fetched[1] == needed
    assert fetched[0] == [number + 2 * STAGING_BUFFERS for number in needed]


@pytest.mark.parametrize("devices", [1, 2])
def test_nothing_waits_between_the_chunks_of_a_prompt(devices: int, log: list[str]) -> None:
    model, tokens = shared_model("llama3"), random_tokens(1, 16 * 6)
    first, second = LoggingDevice("A", log), LoggingDevice("B", log)
    with headinfer.attach(
        model,
        device="simulated",
        simulated_device=[first, first, second if devices == 2 else first],
        **SMALL,
    ) as offload:
        cache = offload.new_cache(300)
        told = []
        cache.progress = lambda done, _all: told.append(done)
        model(tokens, **cache_argument(model, cache))
    chunk = ["A attends", "A attends", "B attends" if devices == 2 else "A attends"]
    during = [each for each in log if "attends" in each or "wait" in each]
    during = during[: during.index("wait for the call")]
    wanted, begun = [], 0
    for number in range(6):
        wanted += chunk
        # Each device has a chunk to work on while the host waits for the one before these.
        if number < 5 and number >= devices:
            begun += 1
            wanted += [f"wait for chunk {begun}"] * devices
    assert during[: len(wanted)] == wanted
    assert told == [16, 32, 48, 64, 80, 96]
