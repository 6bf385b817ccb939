"""Prompts whose host memory is got in the background, a piece at a time, while they pass."""

import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor

import pytest
import torch

import headinfer
from headinfer.device import launches as launches_module
from headinfer.device.launches import launches
from headinfer.device.simulated import SimulatedDevice
from headinfer.errors import MemoryPlanError
from headinfer.integration.calls import cache_argument
from tiny_models import random_tokens, shared_model


class Background(SimulatedDevice):
    """Gets host memory by a thread, as CUDA's device does, which can be held up or refused.

    Attributes:
        asked: bytes of each piece, in order.
        got: of those that were got.
        held: cleared while nothing is to be got but the first `free` pieces.
        refused: whether the others are refused.
    """

    def __init__(self, *, seed: int = 0, free: int = 2**20) -> None:
        super().__init__(seed=seed, host_piece_bytes=2**15)
        self.asked: list[int] = []
        self.got: list[int] = []
        self.held = threading.Event()
        self.begun = threading.Event()
        self.refused = False
        self._free = free
        self._pool = ThreadPoolExecutor(1)

    def host_ahead(self, num_bytes: int) -> Future[torch.Tensor]:
        self.asked.append(num_bytes)
        return self._pool.submit(self._get, num_bytes, len(self.asked) > self._free)

    def _get(self, num_bytes: int, held: bool) -> torch.Tensor:
        if held:
            self.begun.set()
            self.held.wait()
            if self.refused:
                raise MemoryPlanError("cannot lock CPU memory")
        self.got.append(num_bytes)
        return self.host_empty(num_bytes)


@pytest.mark.covering(most=2)
@pytest.mark.parametrize("tokens", [1, 37, 101])
@pytest.mark.parametrize("tile_tokens", [5, 64])
@pytest.mark.parametrize("overlap", [True, False])
def test_a_prompt_in_pieces_of_memory_gives_stocks_logits(
    tokens: int, tile_tokens: int, overlap: bool
) -> None:
    model, prompt = shared_model("llama3"), random_tokens(2, tokens + 6)
    wanted = model(prompt).logits
    device = Background(seed=tokens)
    options = {"chunk_tokens": 7, "tile_tokens": tile_tokens, "overlap": overlap}
    with headinfer.attach(
        model, device="simulated", simulated_device=device, resident_tokens=0, **options
    ) as offload:
        cache = offload.new_cache()
        found = [model(prompt[:, :tokens], **cache_argument(model, cache)).logits]
        layers = model.config.num_hidden_layers
        assert len(set(device.asked[:layers])) == 1, "a layer is behind the others"
        assert len(device.asked) > layers or tokens == 1
        assert device.got == device.asked or tokens == 1  # which waits in a page
        for token in prompt[:, tokens:].split(1, dim=1):
            found.append(model(token, **cache_argument(model, cache)).logits)
        torch.testing.assert_close(torch.cat(found, dim=1), wanted, rtol=1e-4, atol=1e-5)


def test_a_chunk_does_not_wait_for_memory_of_later_ones_nor_does_closing() -> None:
    model, layers = shared_model("llama3"), shared_model("llama3").config.num_hidden_layers
    prompt = random_tokens(1, 8)
    wanted = model(prompt).logits
    device = Background(free=layers)
    with headinfer.attach(
        model, device="simulated", simulated_device=device, chunk_tokens=8, tile_tokens=4
    ) as offload:
        cache = offload.new_cache(max_tokens=500)
        found = model(prompt, **cache_argument(model, cache)).logits  # though nothing more is got
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
        assert device.begun.wait(60)
        assert len(device.got) == layers < len(device.asked)
        assert offload.stats.host_kv_bytes == sum(device.asked)
        cache.close()
        device.held.set()
        device._pool.shutdown()
    assert len(device.got) == layers + 1, "what was given up was got"


@pytest.mark.slow
def test_memory_that_is_refused_in_the_background_fails_the_call_that_needs_it() -> None:
    model, layers = shared_model("llama3"), shared_model("llama3").config.num_hidden_layers
    device = Background(free=layers)
    device.refused = True
    device.held.set()
    with headinfer.attach(
        model, device="simulated", simulated_device=device, chunk_tokens=8, tile_tokens=4
    ) as offload:
        cache = offload.new_cache()
        with pytest.raises(MemoryPlanError, match="cannot lock CPU memory"):
            model(random_tokens(1, 150), **cache_argument(model, cache))
        cache.reset()
        device.refused = False
        prompt = random_tokens(1, 150)
        found = model(prompt, **cache_argument(model, cache)).logits
    torch.testing.assert_close(found, model(prompt).logits, rtol=1e-4, atol=1e-5)


class Polite(Background):
    """Gets host memory while no prompt is launched, as the driver would hold that up."""

    def __init__(self, *, seed: int = 0) -> None:
        super().__init__(seed=seed)
        self.alone: list[bool] = []

    def _get(self, num_bytes: int, held: bool) -> torch.Tensor:
        began_s = time.monotonic()
        launches.wait()
        self.alone.append(time.monotonic() - began_s < 10)
        return super()._get(num_bytes, held)


def test_memory_is_got_while_the_prompt_waits_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launches_module, "_LONGEST_S", 20.0)
    model, prompt = shared_model("llama3"), random_tokens(2, 101)
    wanted = model(prompt).logits
    device = Polite(seed=3)
    with headinfer.attach(
        model, device="simulated", simulated_device=device, chunk_tokens=7, tile_tokens=5
    ) as offload:
        cache = offload.new_cache()
        found = model(prompt, **cache_argument(model, cache)).logits
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert len(device.alone) == len(device.asked)
    assert all(device.alone), "the prompt did not pause"
