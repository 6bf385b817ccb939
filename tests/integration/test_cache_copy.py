"""`copy.deepcopy(cache)`: one prefix and many questions, as in transformers' recipe."""

import copy
import gc
from typing import Any

import pytest
import torch
from transformers import DynamicCache

import headinfer
from headinfer.device.simulated import SimulatedDevice
from headinfer.errors import CacheStateError, MemoryPlanError
from headinfer.integration.calls import cache_argument
from tiny_models import random_tokens, shared_model, tiny_model

DEVICES: list[dict[str, Any]] = [
    {"device": "cpu"},
    {"device": "simulated", "resident_tokens": 0},
    {"device": "simulated", "resident_tokens": 20, "host_attention": 0.5},
    {"device": "simulated", "resident_tokens": "all"},
    {"device": "simulated", "resident_tokens": 8, "overlap": False},
]
each_device = pytest.mark.parametrize(
    "options", DEVICES, ids=["cpu", "link", "shared", "resident", "synchronous"]
)
SMALL = {"chunk_tokens": 16, "tile_tokens": 8}


def held_bytes(*caches: Any) -> int:
    """Return the host memory of caches, what they share counted once."""
    pieces = {
        id(tile.piece): tile.piece
        for cache in caches
        for ledger in cache.state.engine._full
        for tile in ledger.host_tiles(0, 10**6)
    }
    return sum(piece.memory.numel() for piece in pieces.values())


def greedy(model: Any, tokens: torch.Tensor, cache: Any) -> torch.Tensor:
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    return model.generate(tokens, **cache_argument(model, cache), **options)


@pytest.mark.covering
@each_device
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", ["llama3", "gemma3", "qwen3-next"])
def test_many_questions_are_asked_of_one_prefix(
    name: str, batch: int, options: dict[str, Any]
) -> None:
    model = shared_model(name)
    prefix = random_tokens(batch, 41)
    questions = [
        torch.cat([prefix, random_tokens(batch, length, seed=length)], dim=1)
        for length in (1, 5, 20)
    ]
    stock = DynamicCache(config=model.config)
    model(prefix, **cache_argument(model, stock))
    wanted = [greedy(model, question, copy.deepcopy(stock)) for question in questions]
    with headinfer.attach(model, **SMALL, **options) as offload:
        ours = offload.new_cache()
        model(prefix[:, :40], **cache_argument(model, ours))
        model(prefix[:, 40:], **cache_argument(model, ours))  # so that there is a decode tail
        for question, right in zip(questions, wanted, strict=True):
            copied = copy.deepcopy(ours)
            assert copied.get_seq_length() == 41
            assert torch.equal(greedy(model, question, copied), right)
            assert ours.get_seq_length() == 41
        assert torch.equal(greedy(model, questions[2], ours), wanted[2])


@pytest.mark.covering(most=3)
@each_device
def test_a_copy_and_its_original_go_on_by_themselves(options: dict[str, Any]) -> None:
    model = shared_model("llama3")
    tokens, other = random_tokens(2, 120), random_tokens(2, 120, seed=2)
    joined = torch.cat([tokens[:, :50], other[:, 50:]], dim=1)
    stock, stock_joined = model(tokens).logits, model(joined).logits
    with headinfer.attach(model, **SMALL, **options) as offload:
        ours = offload.new_cache()
        model(tokens[:, :50], **cache_argument(model, ours))
        copied = copy.deepcopy(ours)
        start = 50
        for step in (1, 1, 30, 1, 1, 36):  # in turn
            part = slice(start, start + step)
            for cache, given, right in ((ours, tokens, stock), (copied, joined, stock_joined)):
                logits = model(given[:, part], **cache_argument(model, cache)).logits
                torch.testing.assert_close(logits, right[:, part])
            start += step
        ours.close()
        again = copy.deepcopy(copied)
        copied.crop(-70)
        copied.batch_select_indices([1])
        del copied
        logits = model(joined[:, :3], **cache_argument(model, again)).logits
        doubled = torch.cat([joined, joined[:, :3]], dim=1)
        torch.testing.assert_close(logits, model(doubled).logits[:, -3:])


@pytest.mark.parametrize("device", ["cpu", pytest.param("simulated", marks=pytest.mark.slow)])
def test_a_copy_takes_host_memory_for_what_one_of_the_two_changes(device: str) -> None:
    model = shared_model("llama3")
    tokens = random_tokens(1, 700)
    with headinfer.attach(model, host_memory="4MiB", device=device, **SMALL) as offload:
        ours = offload.new_cache()
        for part in tokens.split([20, 300, 380], dim=1):
            model(part, **cache_argument(model, ours))
        before = held_bytes(ours)
        copied = copy.deepcopy(ours)
        assert held_bytes(ours, copied) == before
        for (keys, values, _), (right_keys, right_values, _) in zip(copied, ours, strict=True):
            assert torch.equal(keys, right_keys)
            assert torch.equal(values, right_values)
        copied.crop(-650)
        model(tokens[:, :500], **cache_argument(model, copied))
        assert 0 < held_bytes(ours, copied) - before <= offload.plan.kv_host_bytes(700)
        ours.crop(-650)
        copied.crop(-500)
        for cache in (ours, copied):
            assert [layer.keys.shape[2] for layer in cache.layers] == [50] * 3
        assert torch.equal(ours.layers[2].keys, copied.layers[2].keys)  # what both hold


def test_a_copy_reserves_what_the_original_was_to_reserve() -> None:
    model = shared_model("llama3")
    with headinfer.attach(model, host_memory="4MiB") as offload:
        ours = offload.new_cache(max_tokens=500)
        model(random_tokens(1, 20), **cache_argument(model, ours))
        before = held_bytes(ours)
        copied = copy.deepcopy(ours)
        model(random_tokens(1, 1), **cache_argument(model, copied))
        assert held_bytes(ours, copied) - before == offload.plan.kv_host_bytes(480)
        room = offload.session.host_room(0).kv_bytes
        del copied
        assert offload.session.host_room(0).kv_bytes - room == offload.plan.kv_host_bytes(480)


def test_copies_keep_within_the_host_memory_whatever_they_change() -> None:
    model = shared_model("llama3")
    tokens = random_tokens(2, 200)
    with headinfer.attach(model, host_memory="3MiB", **SMALL) as offload:
        caches = [offload.new_cache()]
        model(tokens, **cache_argument(model, caches[0]))
        with pytest.raises(MemoryPlanError):
            caches.extend(copy.deepcopy(caches[0]) for _ in range(100))
        assert len(caches) > 2
        for cache in caches:
            cache.reorder_cache([1, 0])
        assert held_bytes(*caches) <= 3 * 2**20


def test_a_copy_is_refused_where_host_memory_is_too_small() -> None:
    model = shared_model("llama3")
    with headinfer.attach(model, host_memory="100KiB") as offload:
        ours = offload.new_cache()
        tokens = random_tokens(1, 50)  # 75 KiB
        logits = model(tokens, **cache_argument(model, ours)).logits
        with pytest.raises(MemoryPlanError, match="a copy of the KV cache of 50 tokens needs 75"):
            copy.deepcopy(ours)
        ours.crop(-1)
        more = model(tokens[:, -1:], **cache_argument(model, ours)).logits
        torch.testing.assert_close(more, logits[:, -1:])


def test_a_copy_that_the_device_has_no_room_for_is_refused() -> None:
    model = shared_model("llama3")
    device = SimulatedDevice()
    with headinfer.attach(model, device="simulated", device_memory="1GiB", **SMALL) as offload:
        least = offload.plan.total_device_bytes
    budget = least + 1000
    with headinfer.attach(
        model, device="simulated", device_memory=f"{budget}B", simulated_device=device, **SMALL
    ) as offload:
        ours = offload.new_cache()
        model(random_tokens(1, 50), **cache_argument(model, ours))
        held = device.allocated_bytes
        with pytest.raises(MemoryPlanError):
            copy.deepcopy(ours)
        gc.collect()
        assert device.allocated_bytes == held
        assert ours.get_seq_length() == 50


def test_a_copy_takes_the_residents_memory_where_the_device_is_full() -> None:
    model = shared_model("llama3")
    tokens = random_tokens(1, 60)
    stock = model(tokens).logits
    with headinfer.attach(model, device="simulated", device_memory="1GiB", **SMALL) as offload:
        plan = offload.plan
    room = plan.total_device_bytes - plan.kv_device_bytes + int(2.2 * plan.arena_bytes)
    with headinfer.attach(
        model, device="simulated", device_memory=f"{room}B", resident_tokens="auto", **SMALL
    ) as offload:
        ours = offload.new_cache()
        model(tokens[:, :50], **cache_argument(model, ours))
        copied = copy.deepcopy(ours)
        for cache in (copied, ours):
            logits = model(tokens[:, 50:], **cache_argument(model, cache)).logits
            torch.testing.assert_close(logits, stock[:, 50:])


@pytest.mark.parametrize("device", ["cpu", "simulated"])
def test_an_empty_cache_is_copied(device: str) -> None:
    model = shared_model("llama3")
    tokens = random_tokens(1, 20)
    stock = model(tokens).logits
    with headinfer.attach(model, device=device, **SMALL) as offload:
        ours = offload.new_cache()
        copied = [copy.deepcopy(ours)]
        model(tokens, **cache_argument(model, ours))
        ours.reset()
        copied.append(copy.deepcopy(ours))
        for cache in (*copied, ours):
            assert cache.get_seq_length() == 0
            assert not cache.is_initialized
            logits = model(tokens, **cache_argument(model, cache)).logits
            torch.testing.assert_close(logits, stock)


def test_what_holds_a_cache_and_its_layers_is_copied() -> None:
    model = shared_model("gemma3")
    with headinfer.attach(model, **SMALL) as offload:
        ours = offload.new_cache()
        model(random_tokens(1, 20), **cache_argument(model, ours))
        held = copy.deepcopy({"cache": ours, "again": ours, "layers": ours.layers})
        assert held["cache"] is held["again"] is not ours
        assert held["layers"] is held["cache"].layers
        windows = [layer for layer in ours.layers if layer.is_sliding]
        copied = [layer for layer in held["cache"].layers if layer.is_sliding]
        assert windows[0].keys.data_ptr() != copied[0].keys.data_ptr()
        assert offload.session.owns(held["cache"])


@pytest.mark.parametrize("name", ["llama3", "qwen3-next"])
@pytest.mark.parametrize("device", ["cpu", "simulated"])
def test_a_cache_left_half_way_is_not_copied(name: str, device: str) -> None:
    model = tiny_model(name)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with headinfer.attach(model, device=device, **SMALL) as offload:
        ours = offload.new_cache()
        model(random_tokens(1, 20), **cache_argument(model, ours))
        handle = model.model.layers[2].register_forward_pre_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            model(random_tokens(1, 5), **cache_argument(model, ours))
        handle.remove()
        with pytest.raises(CacheStateError, match="was interrupted"):
            copy.deepcopy(ours)
        ours.reset()
        copy.deepcopy(ours)


@pytest.mark.parametrize("filled", [False, True])
@pytest.mark.parametrize("detach", [False, True])
def test_a_closed_cache_is_not_copied(detach: bool, filled: bool) -> None:
    model = shared_model("llama3")
    with headinfer.attach(model) as offload:
        ours = offload.new_cache()
        if filled:
            model(random_tokens(1, 20), **cache_argument(model, ours))
        if not detach:
            ours.close()
        else:
            offload.detach()
        with pytest.raises(CacheStateError, match=r"closed|detached"):
            copy.deepcopy(ours)


def test_copies_are_freed_at_once() -> None:
    model = shared_model("llama3")
    device = SimulatedDevice()
    with headinfer.attach(model, simulated_device=device, device="simulated", **SMALL) as offload:
        ours = offload.new_cache()
        model(random_tokens(1, 40), **cache_argument(model, ours))
        gc.collect()
        gc.disable()
        try:
            one = device.allocated_bytes
            copied = copy.deepcopy(ours)
            assert device.allocated_bytes == 2 * one
            del copied
            assert device.allocated_bytes == one
        finally:
            gc.enable()
