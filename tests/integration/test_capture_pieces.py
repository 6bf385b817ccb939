"""Decode steps that are captured in pieces: streamed and host-attended tokens between them."""

from typing import Any

import pytest
import torch

import headinfer
from captured import (
    NEW_KIND,
    NEW_TURN,
    few,
    generated,
    launched,
    prompted,
    step,
    steps,
    stock_generated,
)
from headinfer.device.base import Edge
from headinfer.device.hazards import HazardError
from headinfer.device.simulated import SimulatedDevice
from headinfer.engine import balance
from headinfer.integration.calls import cache_argument
from headinfer.offload import Offload
from host_share import launch_a_layer_ahead
from tiny_models import random_tokens, shared_model

PLACEMENTS: dict[str, dict[str, Any]] = {
    "streamed": {"resident_tokens": 0, "tile_heads": 1, "tile_tokens": 24},
    "host": {"resident_tokens": 20, "host_attention": 0.5},
    "synchronous": {"resident_tokens": 0, "overlap": False},
}
NEW_TOKENS = 80
"""Past a page of 64."""


def outcomes(
    name: str, placement: str, use: Any, **options: Any
) -> tuple[headinfer.Stats, list[torch.Tensor]]:
    """Return the stats and what `use` returns with captures; without, it is the same."""
    found = []
    for capture in (False, True):
        settings = {"device": "simulated", **PLACEMENTS[placement], **options}
        with headinfer.attach(shared_model(name), **settings, capture=capture) as offload:
            found.append(use(offload))
            stats = offload.stats
    assert all(map(torch.equal, *found))
    return stats, found[1]


@pytest.mark.covering(most=1)
@pytest.mark.parametrize(
    ("name", "placement"),
    [
        *(("llama3", "streamed"), ("gemma2", "host"), ("gpt-oss", "synchronous")),
        *(
            pytest.param(name, placement, marks=pytest.mark.slow)
            for name, placement in (
                *(("llama3", "host"), ("llama3", "synchronous"), ("gemma2", "streamed")),
                *(("gemma2", "synchronous"), ("gpt-oss", "streamed"), ("gpt-oss", "host")),
            )
        ),
    ],
)
def test_generate_equals_stock_and_launches_few_steps(name: str, placement: str) -> None:
    model, tokens = shared_model(name), random_tokens(1, 70)

    def use(offload: Offload) -> list[torch.Tensor]:
        result = generated(model, tokens, offload.new_cache(), max_new_tokens=NEW_TOKENS)
        return [result.sequences, *result.logits]

    stats, ours = outcomes(name, placement, use)
    stock = stock_generated(model, tokens, max_new_tokens=NEW_TOKENS)
    assert torch.equal(ours[0], stock.sequences)
    assert (stats.captures, launched(stats)) == (1, few(70, NEW_TOKENS - 1))
    moved = stats.bytes_attended_on_host if placement == "host" else stats.bytes_to_device
    assert moved > 0


@pytest.mark.parametrize("done", [20, 21, 22, 23])
def test_a_step_is_taken_back_before_it_is_compared_at_any_place_of_a_page(done: int) -> None:
    """The page that the prompt's 40 tokens begin ends with the 24th of those that follow."""
    model = shared_model("gemma3")

    def use(offload: Offload) -> list[torch.Tensor]:
        cache = prompted(offload, model)
        found = steps(model, cache, done)
        two = random_tokens(1, 2)  # after which the next step is compared
        found.append(step(model, cache, input_ids=two))
        found += steps(model, cache, 8)
        assert cache.get_seq_length() == 40 + done + 2 + 8
        return found

    stats, _ = outcomes("gemma3", "streamed", use)
    # The two tokens, and the step after them. Where that one ends a page, or sends home the one
    # that the two have filled, the next is compared.
    again = NEW_TURN + (done in (21, 22))
    at_64 = done + 2 + again < 24 < done + 2 + 8
    assert launched(stats) == NEW_KIND + 1 + again + at_64


def test_a_conversation_goes_on_after_turns_and_crops() -> None:
    model = shared_model("llama3")

    def use(offload: Offload) -> list[torch.Tensor]:
        cache, found = prompted(offload, model), []
        for turn in range(3):
            found += steps(model, cache, 9)
            cache.crop(-4 - turn)
            found.append(step(model, cache, input_ids=random_tokens(1, 30, seed=turn)))
        return found + steps(model, cache, 5)

    stats, _ = outcomes("llama3", "host", use)
    assert stats.captures == 1
    assert (
        launched(stats) == NEW_KIND + 3 + 3
    )  # and in each turn its tokens, and the step after them


def test_rows_are_rearranged_between_replays() -> None:
    model, tokens = shared_model("llama3"), random_tokens(2, 50)
    options = {"max_new_tokens": 20, "num_beams": 3}

    def use(offload: Offload) -> list[torch.Tensor]:
        return [generated(model, tokens, offload.new_cache(), **options).sequences]

    stats, ours = outcomes("llama3", "streamed", use)
    assert torch.equal(ours[0], stock_generated(model, tokens, **options).sequences)
    assert stats.captured_steps > 0


@pytest.mark.parametrize(
    ("edge", "placement"),
    [
        (Edge.TILE_FILLED, "streamed"),
        (Edge.TILE_FREE, "streamed"),
        (Edge.PAGE_WRITTEN, "streamed"),
        (Edge.QUERY_READY, "host"),
        (Edge.ANSWERED, "host"),
    ],
)
def test_a_replay_that_waits_too_little_is_noticed(edge: Edge, placement: str) -> None:
    """What is enqueued between pieces is checked as in any other step."""
    model = shared_model("llama3")
    device = SimulatedDevice(seed=3)
    settings = {"device": "simulated", **PLACEMENTS[placement], "simulated_device": device}
    offload = headinfer.attach(model, **settings)
    cache = prompted(offload, model)
    steps(model, cache, 4)
    assert offload.stats.captured_steps == 4 - NEW_KIND
    device.skipped_edges = frozenset({edge})
    with pytest.raises(HazardError):
        steps(model, cache, 70)
    device.skipped_edges = frozenset()
    offload.detach()


def test_ctrl_c_between_pieces_is_heard_and_the_cache_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = shared_model("llama3")
    with headinfer.attach(model, device="simulated", **PLACEMENTS["streamed"]) as offload:
        cache = prompted(offload, model)
        steps(model, cache, 5)
        engine = type(cache.state.engine)
        original, calls = engine._attend, []

        def broken_off(*args: Any, **options: Any) -> Any:
            calls.append(args)
            if len(calls) == 2:  # the second layer's
                raise KeyboardInterrupt
            return original(*args, **options)

        with monkeypatch.context() as patch:
            patch.setattr(engine, "_attend", broken_off)
            with pytest.raises(KeyboardInterrupt):
                step(model, cache)
        with pytest.raises(headinfer.errors.CacheStateError, match="interrupted"):
            step(model, cache)
        cache.reset()
        model(random_tokens(1, 40), **cache_argument(model, cache))
        assert steps(model, cache, 3)


def test_the_hosts_share_stays_while_a_step_is_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    model = shared_model("llama3")
    for notes in ("_NOTES", "_UNTRUE_NOTES"):
        monkeypatch.setattr(balance, notes, 1)
    for far in ("_TOGETHER", "_CLOSE"):  # no share is good enough, however busy this machine is
        monkeypatch.setattr(balance, far, 0.0)
    launch_a_layer_ahead(monkeypatch)
    with headinfer.attach(model, device="simulated", **PLACEMENTS["host"]) as offload:
        cache = offload.new_cache()
        model(random_tokens(1, 90), **cache_argument(model, cache))
        corrected = cache.state.engine._balances.at(1)
        corrected.fixed = False  # as where a probe chose the share
        shares = []
        for _ in range(12):
            step(model, cache)
            shares.append(corrected.share)
        assert launched(offload.stats) == NEW_KIND
        assert len(set(shares[2:])) > 1


def test_host_memory_grows_before_a_capture_and_not_within() -> None:
    """A second cache is captured at its first step, for which memory was not reserved."""
    model = shared_model("llama3")
    prompts = [random_tokens(1, 21 + 6 * number, seed=number) for number in range(3)]
    settings = {"device": "simulated", "tile_tokens": 8, "chunk_tokens": 7}
    with headinfer.attach(model, **settings) as offload:
        for tokens in prompts:
            ours = generated(model, tokens, offload.new_cache(), max_new_tokens=12)
            stock = stock_generated(model, tokens, max_new_tokens=12)
            assert torch.equal(ours.sequences, stock.sequences)
        assert offload.stats.captured_steps > 0
