"""A change of a cache that stops half-way, as by Ctrl-C, is noticed by whatever comes next."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

import headinfer
from headinfer.device.simulated import SimulatedDevice
from headinfer.device.simulated_stream import SimulatedStream
from headinfer.engine.engine import Engine
from headinfer.errors import CacheStateError, MemoryPlanError
from headinfer.integration.calls import cache_argument
from headinfer.kv.ledger import Ledger
from tiny_models import random_tokens, shared_model

DEVICES: list[dict[str, Any]] = [
    {"device": "cpu"},
    {"device": "simulated", "resident_tokens": 20, "host_attention": 0.5},
]


class Once:
    """Calls a function, and breaks off before its call of a given number."""

    def __init__(self, function: Callable[..., Any], number: int) -> None:
        self._function = function
        self._left = number

    def __get__(self, instance: object, _owner: type) -> Callable[..., Any]:
        return lambda *args, **options: self(instance, *args, **options)

    def __call__(self, *args: Any, **options: Any) -> Any:
        self._left -= 1
        if self._left == 0:
            raise KeyboardInterrupt
        return self._function(*args, **options)


CHANGES: dict[str, tuple[type, str, int, Callable[[Any], object]]] = {
    "crop": (Engine, "crop", 2, lambda cache: cache.crop(-30)),
    "reorder": (Ledger, "select_host", 3, lambda cache: cache.reorder_cache([1, 0])),
    "rows": (Ledger, "select_host", 2, lambda cache: cache.batch_select_indices([1])),
    "reset": (Ledger, "clear", 2, lambda cache: cache.reset()),
    "interleave": (Ledger, "select_host", 1, lambda cache: cache.batch_repeat_interleave(2)),
}


@pytest.mark.covering
@pytest.mark.parametrize("options", DEVICES, ids=["cpu", "simulated"])
@pytest.mark.parametrize("name", CHANGES)
def test_a_change_that_was_broken_off_is_noticed(
    name: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    owner, method, number, change = CHANGES[name]
    model, tokens = shared_model("llama3"), random_tokens(2, 60)
    stock = model(tokens).logits
    with headinfer.attach(model, chunk_tokens=16, tile_tokens=8, **options) as offload:
        cache = offload.new_cache()
        model(tokens, **cache_argument(model, cache))
        with monkeypatch.context() as patch:
            patch.setattr(owner, method, Once(getattr(owner, method), number))
            with pytest.raises(KeyboardInterrupt):
                change(cache)
        for use in (
            lambda: model(tokens[:, :1], **cache_argument(model, cache)),
            lambda: copy.deepcopy(cache),
        ):
            with pytest.raises(CacheStateError, match="was interrupted"):
                use()
        cache.reset()
        torch.testing.assert_close(model(tokens, **cache_argument(model, cache)).logits, stock)


SENDING: dict[str, Callable[[Any], object]] = {
    "copy": copy.deepcopy,
    "give up": lambda cache: cache.state.engine.give_up_residents(),
}


@pytest.mark.parametrize("change", SENDING)
def test_a_tail_that_was_half_sent_is_noticed(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its tokens would be attended twice, or before they were written."""
    model, tokens = shared_model("llama3"), random_tokens(1, 60)
    options = {"resident_tokens": 8, "chunk_tokens": 16, "tile_tokens": 8}
    with headinfer.attach(
        model, device="simulated", simulated_device=SimulatedDevice(), **options
    ) as offload:
        cache = offload.new_cache()
        model(tokens[:, :57], **cache_argument(model, cache))
        model(tokens[:, 57:59], **cache_argument(model, cache))
        with monkeypatch.context() as patch:
            patch.setattr(SimulatedStream, "copy", Once(SimulatedStream.copy, 2))
            with pytest.raises(KeyboardInterrupt):
                SENDING[change](cache)
        with pytest.raises(CacheStateError, match="was interrupted"):
            model(tokens[:, 59:], **cache_argument(model, cache))


def test_a_reorder_that_gets_no_memory_half_way_is_noticed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, tokens = shared_model("llama3"), random_tokens(2, 60)
    with headinfer.attach(model, device="simulated", chunk_tokens=16, tile_tokens=8) as offload:
        cache = offload.new_cache()
        model(tokens, **cache_argument(model, cache))
        copied = copy.deepcopy(cache)  # so that rows are written to memory of their own
        device, taken = offload.session.device, []
        right = device.host_empty

        def refuse(num_bytes: int) -> torch.Tensor:
            taken.append(num_bytes)
            if len(taken) > 1:
                raise MemoryPlanError("cannot lock")
            return right(num_bytes)

        with monkeypatch.context() as patch:
            patch.setattr(device, "host_empty", refuse)
            with pytest.raises(MemoryPlanError):
                copied.reorder_cache([1, 0])
        with pytest.raises(CacheStateError, match="was interrupted"):
            model(tokens[:, :1], **cache_argument(model, copied))
        model(tokens[:, :1], **cache_argument(model, cache))


def test_a_refused_prompt_reserves_nothing() -> None:
    model = shared_model("llama3")
    with headinfer.attach(model, host_memory="1MiB") as offload:
        cache = offload.new_cache()
        model(random_tokens(1, 20), **cache_argument(model, cache))
        with pytest.raises(MemoryPlanError):
            model(random_tokens(1, 1500), **cache_argument(model, cache))
        model(random_tokens(1, 1), **cache_argument(model, cache))
        assert cache.state.engine.host_kv_bytes == offload.plan.kv_host_bytes(20 + 256)
