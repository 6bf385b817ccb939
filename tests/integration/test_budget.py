"""The device memory that plans are made for: what was asked for, and no more than there is."""

import pytest

import headinfer
from headinfer.device.simulated import SimulatedDevice
from headinfer.errors import MemoryPlanError
from headinfer.plan.memory import runtime_bytes
from tiny_models import shared_model

GIB = 2**30
RUNTIME = runtime_bytes("cuda")


class Card(SimulatedDevice):
    """A device whose plans count CUDA's runtime, and which has so much memory free."""

    name = "cuda"

    def __init__(self, free: int) -> None:
        super().__init__()
        self.free = free

    def free_bytes(self) -> int:
        return self.free


def budget(free: int, asked: str | None) -> int:
    """Return what is left of a plan's budget beside the weights, which are there already."""
    model = shared_model("llama3")
    with headinfer.attach(
        model, device="simulated", simulated_device=Card(free), device_memory=asked
    ) as offload:
        assert offload.plan.total_device_bytes <= offload.plan.device_memory_bytes
        assert offload.plan.runtime_bytes == RUNTIME
        return offload.plan.device_memory_bytes - offload.plan.shape.weights_bytes


@pytest.mark.parametrize("asked", [None, "auto"])
def test_left_open_it_is_most_of_what_is_free_beside_the_runtime(asked: str | None) -> None:
    assert budget(GIB, asked) == RUNTIME + int(0.9 * GIB)


def test_what_is_asked_for_is_given() -> None:
    weights = headinfer.attach(shared_model("llama3"), device="simulated")
    weights.detach()
    assert budget(40 * GIB, "24GiB") == 24 * GIB - weights.plan.shape.weights_bytes


@pytest.mark.parametrize(
    ("free", "there"),
    [
        (16 * GIB, 16 * GIB),  # the runtime's item is kept back for libraries still to be loaded
        (GIB, RUNTIME + int(0.9 * GIB)),  # never less than if nothing had been asked for
    ],
)
def test_more_than_there_is_becomes_what_there_is(free: int, there: int) -> None:
    assert budget(free, "24GiB") == there


@pytest.mark.parametrize("asked", [None, "24GiB"])
def test_a_device_that_is_full_is_refused_in_one_line(asked: str | None) -> None:
    with pytest.raises(MemoryPlanError) as refusal:
        budget(2**16, asked)
    message = str(refusal.value)
    assert "\n" not in message
    assert "is too small" in message
    assert "CUDA itself 1.25 GiB" in message
    assert "all the device has" in message
    assert ("24.00 GiB" in message) == (asked is not None)
