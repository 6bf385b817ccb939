"""The share of a prompt's time in which each of several devices works."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest

import headinfer
from headinfer.engine.busy import BusyTimes
from headinfer.engine.stats import Stats
from headinfer.integration.calls import cache_argument
from parted import spread
from tiny_models import random_tokens, shared_model

SMALL: dict[str, Any] = {"tile_heads": 1, "tile_tokens": 20, "chunk_tokens": 16}


@dataclass
class Moment:
    """An event at a time, which nobody knows before the device has reached it."""

    at_s: float | None

    def seconds_to(self, other: "Moment") -> float | None:
        if self.at_s is None or other.at_s is None:
            return None
        return other.at_s - self.at_s


class Clock:
    """A device whose events have the times that a test wants."""

    def __init__(self, *times_s: float | None) -> None:
        self._times = iter(times_s)
        self.compute = self

    @contextlib.contextmanager
    def in_use(self) -> Iterator[None]:
        yield

    def record(self, *, timed: bool) -> Moment:
        assert timed
        return Moment(next(self._times))


def test_a_device_works_until_the_chunk_leaves_it() -> None:
    first, second = Clock(0, 2, 2, 5), Clock(2, 3, 5, 6)
    busy = BusyTimes([first, second])
    for _ in range(2):
        for device in (first, first, second, second):  # two layers each
            busy.begin(device)
        busy.pause()
    assert busy.take() == (2 + 3, 1 + 1)
    assert busy.take() == ()


def test_a_device_that_comes_twice_in_a_chunk_rests_in_between() -> None:
    first, second = Clock(0, 1, 4, 6), Clock(1, 4)
    busy = BusyTimes([first, second])
    for device in (first, second, first):
        busy.begin(device)
    assert busy.take() == (1 + 2, 3)


def test_one_device_is_not_watched_and_unknown_times_are_none() -> None:
    alone = Clock()
    busy = BusyTimes([alone])
    busy.begin(alone)
    assert busy.take() == ()
    first, second = Clock(0, None), Clock(0, 1)
    busy = BusyTimes([first, second])
    busy.begin(first)
    busy.begin(second)
    assert busy.take() == ()


def test_prompts_add_up_and_shares_are_of_their_time() -> None:
    stats = Stats()
    stats.add_prefill(100, 4.0, (3.0, 1.0))
    stats.add_prefill(100, 4.0, ())
    stats.add_prefill(200, 2.0, (1.0, 2.0))
    assert (stats.prefill_tokens, stats.prefill_s) == (400, 10.0)
    assert stats.device_prefill_s == (4.0, 3.0)
    assert stats.device_busy == pytest.approx((0.4, 0.3))


def test_an_attachment_tells_of_each_device_and_of_prompts_alone() -> None:
    model, tokens = shared_model("llama3"), random_tokens(1, 100)
    with headinfer.attach(
        model, device="simulated", simulated_device=spread(0, 1, 1), **SMALL
    ) as offload:
        cache = offload.new_cache()
        model(tokens, **cache_argument(model, cache))
        both = offload.stats.device_prefill_s
        assert len(both) == 2
        assert all(seconds > 0 for seconds in both)
        assert cache.stats.device_prefill_s == both
        model(tokens[:, :1], **cache_argument(model, cache))
        assert offload.stats.device_prefill_s == both
    with headinfer.attach(model, device="simulated", **SMALL) as offload:
        model(tokens, **cache_argument(model, offload.new_cache()))
        assert offload.stats.device_busy == ()


def test_what_a_prompt_that_failed_has_left_is_not_counted() -> None:
    model, tokens = shared_model("llama3"), random_tokens(1, 100)

    def times(*, failing: bool) -> tuple[float, ...]:
        def progress(done_tokens: int, _all_tokens: int) -> None:
            if failing and done_tokens > 40:
                raise KeyboardInterrupt

        devices = spread(0, 1, 1)
        with headinfer.attach(
            model, device="simulated", simulated_device=devices, progress=progress, **SMALL
        ) as offload:
            if failing:
                with pytest.raises(KeyboardInterrupt):
                    model(tokens, **cache_argument(model, offload.new_cache()))
                failing = False
            model(tokens, **cache_argument(model, offload.new_cache()))
            return offload.stats.device_prefill_s

    plain, after = times(failing=False), times(failing=True)
    assert sum(after) < 1.2 * sum(plain)


def test_what_other_calls_do_between_two_chunks_is_not_counted() -> None:
    first, second = Clock(0, 2, 10, 20, 30, 32), Clock(2, 3, 20, 21, 32, 33)
    busy = BusyTimes([first, second])

    def chunk() -> None:
        busy.begin(first)
        busy.begin(second)
        busy.pause()

    chunk()
    with busy.suspended():
        chunk()
        assert busy.take() == (10, 1)
    chunk()
    assert busy.take() == (2 + 2, 1 + 1)
