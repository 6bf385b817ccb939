"""The device memory that plans are made for: what was asked for, and no more than there is."""

import pytest
import torch

import headinfer
from headinfer.device.simulated import SimulatedDevice
from headinfer.errors import MemoryPlanError
from headinfer.plan.memory import activation_bytes, runtime_bytes
from headinfer.plan.plan import Plan
from shared_device import SharedDevice
from tiny_models import random_tokens, shared_model

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


def test_a_cache_that_grows_counts_its_own_memory_as_free() -> None:
    model, tokens = shared_model("llama3"), random_tokens(1, 1600)
    device = SharedDevice(8 * 2**20)
    with headinfer.attach(
        model, device="simulated", simulated_device=device, chunk_tokens=256
    ) as offload:
        cache = offload.new_cache()
        plans = []
        for begin in range(0, 1600, 400):
            model(tokens[:, begin : begin + 400], past_key_values=cache, logits_to_keep=1)
            plans.append(cache.state.engine.plan)
        assert len({plan.context_tokens for plan in plans}) > 1
        assert {plan.device_memory_bytes for plan in plans} == {offload.plan.device_memory_bytes}


@pytest.mark.parametrize("mib", [3, 5, 8, 12])
def test_a_call_with_any_of_several_caches_keeps_within_the_budget(mib: int) -> None:
    model, tokens = shared_model("llama3"), random_tokens(1, 200)
    stock = model(tokens, logits_to_keep=1).logits
    sized = headinfer.attach(model, device="simulated")
    sized.detach()
    enough = sized.plan.shape.weights_bytes + mib * 2**20
    with headinfer.attach(
        model, device="simulated", tile_tokens=32, device_memory=enough
    ) as offload:
        caches = [offload.new_cache() for _ in range(4)]
        for cache in caches:
            model(tokens[:, :150], past_key_values=cache, logits_to_keep=1)
        plans = [cache.state.engine.plan for cache in caches]
        held = sum(plan.kv_device_bytes for plan in plans)
        assert plans[0].shape.weights_bytes + held + max(map(activations, plans)) <= enough
        for cache in caches:
            ours = model(tokens[:, 150:], past_key_values=cache, logits_to_keep=1).logits
            torch.testing.assert_close(ours, stock)


def activations(plan: Plan) -> int:
    """Return what a call with a cache takes by the chunks it passes."""
    return activation_bytes(
        plan.shape,
        chunk_tokens=plan.chunk_tokens,
        tile_heads=plan.tile_heads,
        batch=plan.batch,
        device=plan.device,
    )
