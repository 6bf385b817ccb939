"""Decode steps in one capture though tokens are streamed in them, or attended by the host."""

import copy
import shutil
import sys
from typing import Any

import pytest
import torch

import headinfer
from captured import (
    NEW_KIND,
    few,
    generated,
    launched,
    prompted,
    step,
    steps,
    stock_generated,
)
from headinfer.attend.native import kernel as native
from headinfer.device.base import Edge
from headinfer.device.hazards import HazardError
from headinfer.device.simulated import SimulatedDevice
from headinfer.device.simulated_capture import SimulatedCapture
from headinfer.device.simulated_stream import SimulatedStream
from headinfer.engine import balance, flagged
from headinfer.engine.flagged import FlaggedHost
from headinfer.engine.one_launch_share import StepTimes
from headinfer.engine.ready import Form
from headinfer.engine.streaming_step import StreamingStep
from headinfer.integration.calls import cache_argument
from headinfer.offload import Offload
from headinfer.schedule import route
from host_share import launch_a_layer_ahead
from tiny_models import random_tokens, shared_model

PLACEMENTS: dict[str, dict[str, Any]] = {
    "streamed": {"resident_tokens": 0, "tile_heads": 1, "tile_tokens": 48, "chunk_tokens": 16},
    "host": {"resident_tokens": 0, "host_attention": 0.99, "chunk_tokens": 16},
    "both": {
        "resident_tokens": 9,
        "host_attention": 0.5,
        "tile_heads": 2,
        "tile_tokens": 16,
        "chunk_tokens": 16,
    },
}
"""Pages of 8 tokens, so that many fill while what is streamed stays."""

STEADY_TOKENS = 48

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or shutil.which("cc") is None, reason="no jobs without a C compiler"
)


@pytest.fixture(autouse=True)
def _few_tokens_are_steady(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have what is streamed stay for a while though there are few tokens in a test."""
    monkeypatch.setattr(route, "STEADY_TOKENS", STEADY_TOKENS)
    monkeypatch.setattr(route, "_STEADY_FROM", 0)


def forms(cache: Any) -> set[Form]:
    """Return the forms in which a cache's steps are captured."""
    return {form for _, form in cache.state.engine.captured}


def attached(name: str, placement: str, **options: Any) -> Offload:
    """Return an attachment to a shared model; the caller detaches it."""
    settings = {"device": "simulated", **PLACEMENTS[placement], **options}
    return headinfer.attach(shared_model(name), **settings)


def outcomes(
    name: str, placement: str, use: Any, **options: Any
) -> tuple[headinfer.Stats, list[torch.Tensor]]:
    """Return the stats and what `use` returns with captures; without, it is the same."""
    found = []
    for capture in (False, True):
        with attached(name, placement, **options, capture=capture) as offload:
            found.append(use(offload))
            stats = offload.stats
    assert len(found[0]) == len(found[1])
    assert all(map(torch.equal, *found))
    return stats, found[1]


@pytest.mark.covering(most=1)
@pytest.mark.parametrize(
    ("name", "placement"),
    [
        *(("llama3", "streamed"), ("llama3", "host"), ("gemma3", "both"), ("gpt-oss", "both")),
        *(
            pytest.param(name, placement, marks=pytest.mark.slow)
            for name, placement in (("gemma3", "streamed"), ("gpt-oss", "host"), ("llama3", "both"))
        ),
    ],
)
def test_generate_equals_stock_and_captures_seldom(name: str, placement: str) -> None:
    """Pages fill and go home between replays; what is streamed changes each 48 tokens."""
    model, tokens, new_tokens = shared_model(name), random_tokens(1, 70), 150

    def use(offload: Offload) -> list[torch.Tensor]:
        cache = offload.new_cache()
        result = generated(model, tokens, cache, max_new_tokens=new_tokens)
        assert not offload.stats.captures or Form.STREAMED in forms(cache)
        return [result.sequences, *result.logits]

    stats, ours = outcomes(name, placement, use)
    stock = stock_generated(model, tokens, max_new_tokens=new_tokens)
    assert torch.equal(ours[0], stock.sequences)
    in_pieces = 1  # until another capture is due
    assert 1 <= stats.captures <= 2 + new_tokens // STEADY_TOKENS + in_pieces
    assert launched(stats) <= few(70, new_tokens - 1) + stats.captures + in_pieces
    assert (stats.bytes_attended_on_host > 0) == (placement != "streamed")
    assert (stats.host_attention_s > 0) == (placement != "streamed")


def test_one_capture_serves_while_pages_go_home() -> None:
    model = shared_model("llama3")
    for placement in PLACEMENTS:
        with attached("llama3", placement) as offload:
            cache = offload.new_cache(200)
            model(random_tokens(1, 110), past_key_values=cache)
            home = offload.stats.bytes_to_host
            steps(model, cache, 30)  # to before 144 tokens
            assert offload.stats.bytes_to_host > 1.2 * home
            assert (offload.stats.captures, forms(cache)) == (1, {Form.STREAMED})
            assert launched(offload.stats) == few(110, 30)


def test_bytes_are_counted_as_those_of_launched_steps() -> None:
    """But for the room of a last tile, which is copied before tokens are there."""
    model, counted = shared_model("llama3"), []
    for capture in (False, True):
        with attached("llama3", "both", capture=capture) as offload:
            cache = prompted(offload, model)
            steps(model, cache, 20)
            before = copy.copy(offload.stats)
            steps(model, cache, 4)
            stats = offload.stats
            counted.append(
                (
                    stats.bytes_to_device - before.bytes_to_device,
                    stats.bytes_attended_on_host - before.bytes_attended_on_host,
                    stats.bytes_to_host - before.bytes_to_host,
                )
            )
    assert counted[0][1:] == counted[1][1:]
    assert counted[1][0] > 0


@pytest.mark.slow
def test_a_conversation_goes_on_after_turns_crops_and_other_caches() -> None:
    model = shared_model("llama3")

    def use(offload: Offload) -> list[torch.Tensor]:
        cache, other, found = prompted(offload, model), prompted(offload, model, seed=3), []
        for turn in range(3):
            found += steps(model, cache, 9)
            found += steps(model, other, 5, first=turn)
            cache.crop(-4 - 9 * turn)  # into what the host holds
            found.append(step(model, cache, input_ids=random_tokens(1, 30, seed=turn)))
            found.append(step(model, other))
        copied = copy.deepcopy(cache)
        for at in range(6):
            found += [step(model, each, 3 + at) for each in (cache, copied, other)]
        cache.close()
        return found + steps(model, copied, 5)

    stats, _ = outcomes("llama3", "both", use)
    assert stats.captured_steps > 20


@pytest.mark.slow
def test_rows_are_rearranged_between_replays() -> None:
    model, tokens = shared_model("llama3"), random_tokens(2, 50)
    options = {"max_new_tokens": 20, "num_beams": 3}

    def use(offload: Offload) -> list[torch.Tensor]:
        return [generated(model, tokens, offload.new_cache(), **options).sequences]

    stats, ours = outcomes("llama3", "both", use)
    assert torch.equal(ours[0], stock_generated(model, tokens, **options).sequences)
    assert stats.captured_steps > 0


def test_heads_that_stream_stand_beside_those_that_see_all() -> None:
    model = shared_model("llama3")
    options = {"sparsity": 0.5, "head_pattern": "random", "sink_tokens": 3, "recent_tokens": 7}

    def use(offload: Offload) -> list[torch.Tensor]:
        cache = prompted(offload, model)
        found = steps(model, cache, 30)
        assert not offload.stats.captures or forms(cache) == {Form.STREAMED}
        return found

    stats, _ = outcomes("llama3", "both", use, **options)
    assert stats.captured_steps > 20


@pytest.mark.parametrize(
    ("edge", "placement"),
    [
        *((edge, "streamed") for edge in (Edge.TILE_FILLED, Edge.TILE_FREE)),
        *((edge, "host") for edge in (Edge.QUERY_READY, Edge.SERVED, Edge.ANSWERED)),
        *((Edge.STEP_READY, placement) for placement in PLACEMENTS),
    ],
)
def test_a_replay_that_waits_too_little_is_noticed(edge: Edge, placement: str) -> None:
    model, device = shared_model("llama3"), SimulatedDevice(seed=3)
    offload = attached("llama3", placement, simulated_device=device)
    cache = prompted(offload, model)
    steps(model, cache, 6)
    assert forms(cache) == {Form.STREAMED}
    assert offload.stats.captured_steps == 6 - NEW_KIND
    device.skipped_edges = frozenset({edge})
    with pytest.raises(HazardError):
        steps(model, cache, 20)
    device.skipped_edges = frozenset()
    device.synchronize()
    offload.detach()


def test_a_flag_left_up_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The next step would pass by the old answer."""
    model, device = shared_model("llama3"), SimulatedDevice()
    monkeypatch.setattr(SimulatedStream, "lower_flag", lambda _stream, _flag: None)
    offload = attached("llama3", "host", simulated_device=device)
    cache = prompted(offload, model)
    with pytest.raises(HazardError, match=r"read on compute .* is not ordered"):
        steps(model, cache, 6)
    device.synchronize()
    offload.detach()


@pytest.mark.covering(most=1)
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_step_broken_off_before_its_replay_is_done_again(
    error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = shared_model("llama3")
    with attached("llama3", "both") as offload:
        cache, other = prompted(offload, model), prompted(offload, model)
        wanted = [step(model, other, 3 + at) for at in range(30)]
        found = steps(model, cache, 12)

        def broken_off(*_args: Any, **_options: Any) -> None:
            raise error

        for _ in range(2):
            with monkeypatch.context() as patch:
                patch.setattr(StreamingStep, "prepare", broken_off)
                with pytest.raises(error):
                    step(model, cache)
            found.append(step(model, cache, 3 + len(found)))
        found += steps(model, cache, 30 - len(found), first=len(found))
        assert all(map(torch.equal, found, wanted))
        assert forms(cache) == {Form.STREAMED}


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_capture_broken_off_leaves_no_question_unanswered(
    error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second layer fails, when the host was asked by the first one."""
    model = shared_model("llama3")
    original, calls = StreamingStep.attend, []

    def broken_off(*args: Any) -> None:
        calls.append(args)
        if len(calls) == 2:
            raise error
        original(*args)

    with attached("llama3", "host") as offload:
        cache, other = prompted(offload, model), prompted(offload, model)
        wanted = [step(model, other, 3 + at) for at in range(12)]
        offload.detach()
    with attached("llama3", "host") as offload:
        cache = prompted(offload, model)
        found = steps(model, cache, 1)
        with monkeypatch.context() as patch:
            patch.setattr(StreamingStep, "attend", broken_off)
            if error is RuntimeError:  # which leaves the form in pieces
                found.append(step(model, cache, 3 + len(found)))
            else:
                with pytest.raises(error):
                    step(model, cache, 3 + len(found))
        found += steps(model, cache, 12 - len(found), first=len(found))
        assert all(map(torch.equal, found, wanted))
        kept = Form.IN_PIECES if error is RuntimeError else Form.STREAMED
        assert forms(cache) == {kept}


def test_without_jobs_a_step_is_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    model = shared_model("llama3")
    monkeypatch.setattr(native, "job_library", lambda _dtype: None)

    def use(offload: Offload) -> list[torch.Tensor]:
        cache = prompted(offload, model)
        found = steps(model, cache, 12)
        assert not offload.stats.captures or forms(cache) == {Form.IN_PIECES}
        return found

    stats, _ = outcomes("llama3", "host", use)
    assert stats.captures == 1


@pytest.mark.slow
def test_a_share_that_changes_is_settled_in_pieces_first(monkeypatch: pytest.MonkeyPatch) -> None:
    model = shared_model("llama3")
    monkeypatch.setattr(FlaggedHost, "times", lambda _host: None)
    launch_a_layer_ahead(monkeypatch)
    with attached("llama3", "both") as offload:
        tokens = random_tokens(1, 100)
        cache, corrected = with_a_share_to_correct(monkeypatch, offload, model, tokens)
        shares = []
        for _ in range(25):
            step(model, cache)
            shares.append((corrected.share, frozenset(forms(cache))))
        settled = shares[-1]
        assert settled[1] == {Form.IN_PIECES, Form.STREAMED}
        assert (shares[3][1], len({share for share, _ in shares[:8]}) > 1) == (
            {Form.IN_PIECES},
            True,
        )
        assert shares[-5:] == [settled] * 5
        captures = offload.stats.captures
        for part, more in ((0.5, 1), (0.25, 1)):  # the second one comes too soon for a capture
            corrected._settled.in_one_launch.share = part * settled[0]
            steps(model, cache, 5)
            assert offload.stats.captures == captures + more


@pytest.mark.covering(most=1)
@pytest.mark.parametrize("slower", [False, True])
def test_captured_steps_correct_the_share_by_what_they_take(
    monkeypatch: pytest.MonkeyPatch, *, slower: bool
) -> None:
    """A larger share has another capture and the same tokens; one that costs time is taken back."""
    model, shares = shared_model("llama3"), []

    def times(host: FlaggedHost) -> StepTimes | None:
        if measured(host) is None:
            return None
        share = corrected.share
        host_s = share if not slower or share == shares[0] else 10 * share
        return StepTimes(host_s, max(0.8 - 2 * share, 0.0), least_s=0.0)

    def count_step(host: FlaggedHost) -> None:
        shares.append(corrected.share)
        counted(host)

    measured, counted = FlaggedHost.times, FlaggedHost.count_step
    monkeypatch.setattr(flagged, "_LEAST_LAYERS", 2)
    monkeypatch.setattr(FlaggedHost, "times", times)
    monkeypatch.setattr(FlaggedHost, "count_step", count_step)
    tokens = random_tokens(1, 101)
    wanted = stock_generated(model, tokens, max_new_tokens=40).sequences
    with attached("llama3", "both") as offload:
        cache, corrected = with_a_share_to_correct(monkeypatch, offload, model, tokens[:, :100])
        corrected._settled = balance.Settled(0.3, host_s=1.0)  # as another cache has found
        assert torch.equal(generated(model, tokens, cache, max_new_tokens=40).sequences, wanted)
        found = list(dict.fromkeys(shares))
        last = corrected.share
        assert offload.stats.captured_steps > 20
        assert {Form.STREAMED} <= forms(cache)
    assert found[1] > 1.03 * found[0]
    assert last == (found[0] if slower else found[-1])
    assert shares[-1] == last
    if not slower:  # the host waits no more
        assert last == pytest.approx(0.4, rel=0.05)


def with_a_share_to_correct(
    monkeypatch: pytest.MonkeyPatch,
    offload: Offload,
    model: Any,
    tokens: torch.Tensor,
) -> tuple[Any, Any]:
    """Return a cache with a prompt, and the balance of its steps, as where a probe chose it."""
    for notes in ("_NOTES", "_UNTRUE_NOTES"):
        monkeypatch.setattr(balance, notes, 1)
    cache = offload.new_cache(300)
    model(tokens, past_key_values=cache)
    corrected = cache.state.engine._balances.at(1)
    corrected.fixed = False
    return cache, corrected


@pytest.mark.slow
def test_what_a_capture_takes_goes_with_its_cache() -> None:
    model, device = shared_model("llama3"), SimulatedDevice(seed=2)
    with attached("llama3", "both", simulated_device=device) as offload:
        for _ in range(3):
            cache = prompted(offload, model)
            steps(model, cache, 12)
            assert Form.STREAMED in forms(cache)
            engine = cache.state.engine
            cache.reset()
            assert not engine.captured
            model(random_tokens(1, 40), **cache_argument(model, cache))
            steps(model, cache, 3)
        del cache, engine
        device.memory.check()
    assert device.allocated_bytes == 0


@pytest.mark.covering(most=1)
@pytest.mark.parametrize("placement", ["host", "streamed"])
def test_tokens_that_are_taken_back_and_given_anew_are_counted(placement: str) -> None:
    """As assisted generation does it, wherever in a page the tokens lie."""
    model = shared_model("llama3")

    def use(offload: Offload) -> list[torch.Tensor]:
        cache = offload.new_cache(400)
        model(random_tokens(1, 110), **cache_argument(model, cache))
        logits = steps(model, cache, 4)
        for count in range(2, 10):
            first = 10 * count
            logits += steps(model, cache, count, first=first)
            tokens = cache.get_seq_length()
            cache.crop(-3)
            again = random_tokens(1, 3, seed=first)
            logits.append(model(again, **cache_argument(model, cache)).logits)
            logits.append(step(model, cache, first))
            cache.crop(-1)
            logits.append(step(model, cache, first + 1))
            assert cache.get_seq_length() == tokens + 1
        return logits

    stats, _ = outcomes("llama3", placement, use)
    assert stats.captured_steps > 8


@pytest.mark.covering
@pytest.mark.parametrize("way", ["close", "reset", "detach"])
@pytest.mark.parametrize("placement", ["streamed", "host"])
def test_an_interrupt_right_behind_a_launch_leaves_its_memory_until_it_ran(
    placement: str, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = shared_model("llama3")
    with attached("llama3", placement) as offload:
        cache = offload.new_cache(400)
        model(random_tokens(1, 110), **cache_argument(model, cache))
        steps(model, cache, 8)
        assert offload.stats.captured_steps
        replay = SimulatedCapture.replay

        def interrupted(capture: SimulatedCapture[Any]) -> None:
            replay(capture)
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(SimulatedCapture, "replay", interrupted)
            with pytest.raises(KeyboardInterrupt):
                step(model, cache)
        if way != "detach":
            getattr(cache, way)()
        if way == "reset":
            assert cache.get_seq_length() == 0
