"""Passes of several tokens that are captured and replayed, as those that verify drafts are."""

import gc
import shutil
import sys
import weakref
from typing import Any

import pytest
import torch

import headinfer
from captured import NEW_KIND, SIMULATED, step
from headinfer.device.base import Edge
from headinfer.device.hazards import HazardError
from headinfer.device.simulated import SimulatedDevice
from headinfer.engine import balance
from headinfer.engine.ready import Form
from headinfer.integration.calls import cache_argument
from headinfer.offload import Offload
from headinfer.schedule import route
from host_share import launch_a_layer_ahead
from parted import spread
from tiny_models import random_tokens, shared_model, tiny_model

PLACEMENTS: dict[str, dict[str, Any]] = {
    "resident": {"resident_tokens": "all"},
    "streamed": {"resident_tokens": 0, "tile_heads": 1, "tile_tokens": 48, "chunk_tokens": 128},
    "host": {"resident_tokens": 0, "host_attention": 0.99, "chunk_tokens": 128},
    "both": {
        "resident_tokens": 9,
        "host_attention": 0.5,
        "tile_heads": 2,
        "tile_tokens": 16,
        "chunk_tokens": 128,
    },
}
"""Pages of 64 tokens."""

BEST = {each: Form.ONE_LAUNCH if each == "resident" else Form.STREAMED for each in PLACEMENTS}

PROMPT_TOKENS = 150

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or shutil.which("cc") is None, reason="no jobs without a C compiler"
)


@pytest.fixture(autouse=True)
def _few_tokens_are_steady(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have what is streamed stay for a while though there are few tokens in a test."""
    monkeypatch.setattr(route, "STEADY_TOKENS", 48)
    monkeypatch.setattr(route, "_STEADY_FROM", 0)


def forms(cache: Any, new_tokens: int) -> set[Form]:
    """Return the forms in which passes of so many tokens are captured."""
    captured = cache.state.engine.captured
    return {form for (_, form), each in captured.items() if each.new_tokens == new_tokens}


def verified(
    model: Any, cache: Any, count: int, accepted: int, seed: int, *, rows: int = 1
) -> torch.Tensor:
    """Return the logits of a pass, all but some of whose tokens are then taken back."""
    tokens = random_tokens(rows, count, seed=seed)
    with cache.verifying():
        logits: torch.Tensor = model(tokens, **cache_argument(model, cache)).logits
    if accepted < count:
        cache.crop(accepted - count)
    return logits


def passes(model: Any, cache: Any, number: int) -> None:
    """Run some passes of 3 tokens, of which 2 are accepted."""
    for seed in range(number):
        verified(model, cache, 3, 2, seed)


def prompted(offload: Offload, model: Any, *, rows: int = 1) -> Any:
    cache = offload.new_cache(400)
    model(random_tokens(rows, PROMPT_TOKENS), **cache_argument(model, cache))
    return cache


def outcomes(name: str, placement: str, use: Any, **options: Any) -> headinfer.Stats:
    """Return the stats of `use` with captures; without, it gives the same tensors."""
    model, found = shared_model(name), []
    settings = {**SIMULATED, **PLACEMENTS[placement], **options}
    for capture in (False, True):
        with headinfer.attach(model, **settings, capture=capture) as offload:
            found.append(use(offload, model))
            stats = offload.stats
        if not capture:
            assert stats.captured_verifications == 0
    assert all(map(torch.equal, *found))
    return stats


@pytest.mark.covering(most=2)
@pytest.mark.parametrize(
    ("name", "placement", "count"),
    [
        *(("llama3", placement, 5) for placement in ("resident", "streamed", "both")),
        ("llama3", "host", 16),
        *(
            pytest.param("llama3", placement, count, marks=pytest.mark.slow)
            for placement in PLACEMENTS
            for count in (2, 8, 16)
            if (placement, count) != ("host", 16)
        ),
    ],
)
def test_passes_have_the_bits_of_launched_ones(name: str, placement: str, count: int) -> None:
    """Whatever is accepted of them, over several pages."""
    taken = [1 + (3 * at) % count for at in range(16)]

    def use(offload: Offload, model: Any) -> list[torch.Tensor]:
        cache = prompted(offload, model)
        found = [verified(model, cache, count, each, at) for at, each in enumerate(taken)]
        assert cache.get_seq_length() == PROMPT_TOKENS + sum(taken)
        assert not offload.stats.captures or BEST[placement] in forms(cache, count)
        return found

    stats = outcomes(name, placement, use)
    assert stats.captured_verifications == stats.captured_steps
    doubled = PROMPT_TOKENS + sum(taken) >= 256  # where captures are compared again
    crossed = 0 if placement == "resident" else (PROMPT_TOKENS + sum(taken)) // 64 - 1
    assert stats.captured_verifications >= len(taken) - NEW_KIND - doubled - 2 * crossed


@pytest.mark.parametrize(
    ("name", "placement"),
    [
        ("gpt-oss", "host"),
        ("gemma3", "resident"),
        pytest.param("gemma3", "both", marks=pytest.mark.slow),
    ],
)
def test_passes_with_windows_are_in_pieces(name: str, placement: str) -> None:
    """Windows are attended by masks, which depend on where their tokens lie."""

    def use(offload: Offload, model: Any) -> list[torch.Tensor]:
        cache = prompted(offload, model)
        found = [verified(model, cache, 4, 1 + at % 4, at) for at in range(12)]
        assert not offload.stats.captures or forms(cache, 4) == {Form.IN_PIECES}
        return found

    assert outcomes(name, placement, use).captured_verifications > 4


@pytest.mark.parametrize(
    ("placement", "rows"), [("streamed", 2), pytest.param("both", 3, marks=pytest.mark.slow)]
)
def test_rows_pass_together(placement: str, rows: int) -> None:
    def use(offload: Offload, model: Any) -> list[torch.Tensor]:
        cache = prompted(offload, model, rows=rows)
        return [verified(model, cache, 3, 2, at, rows=rows) for at in range(7)]

    assert outcomes("llama3", placement, use).captured_verifications == 7 - NEW_KIND


@pytest.mark.parametrize("placement", ["both", pytest.param("resident", marks=pytest.mark.slow)])
def test_layers_on_several_devices_pass_in_one_capture(placement: str) -> None:
    model, found = shared_model("llama3"), []
    for capture in (False, True):
        settings = {**SIMULATED, **PLACEMENTS[placement], "simulated_device": spread(0, 1, 1)}
        with headinfer.attach(model, **settings, capture=capture) as offload:
            cache = prompted(offload, model)
            found += [[verified(model, cache, 5, 1 + at % 5, at) for at in range(9)]]
            assert (BEST[placement] in forms(cache, 5)) == capture
            assert (offload.stats.captured_verifications > 4) == capture
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize("placement", [pytest.param("resident", marks=pytest.mark.slow), "both"])
def test_drafts_and_steps_between_passes_leave_their_captures(placement: str) -> None:
    def use(offload: Offload, model: Any) -> list[torch.Tensor]:
        cache, found = prompted(offload, model), []
        for at in range(12):
            with cache.drafting():
                found += [step(model, cache, 3 + at + draft) for draft in range(2)]
            found.append(verified(model, cache, 3, 1 + at % 3, at))
            if at % 4 == 3:
                found += [step(model, cache, 5), step(model, cache, 6)]
        return found

    stats = outcomes("llama3", placement, use, draft_tokens=40)
    assert stats.captured_verifications > 5
    assert stats.captured_steps > stats.captured_verifications
    assert stats.captured_drafts > 12
    assert stats.captures <= 5


def test_tiles_that_were_fetched_ahead_serve_the_pass_behind_a_rejection() -> None:
    """What is taken back of a page changes none of them."""
    model = shared_model("llama3")
    settings = {**SIMULATED, **PLACEMENTS["streamed"]}
    with headinfer.attach(model, **settings) as offload:
        cache, counted = prompted(offload, model), []
        for at in range(10):
            before = offload.stats.bytes_to_device
            verified(model, cache, 4, 2, at)
            counted.append(offload.stats.bytes_to_device - before)
        stored = cache.state.engine._full[0]
        room = route.growing_end(0, stored.host_tokens)
        assert offload.stats.captured_verifications == 10 - NEW_KIND
        layers = len(cache.state.engine._full)
        step_bytes = layers * stored.geometry.num_bytes(room)
        assert set(counted[NEW_KIND + 1 :]) == {step_bytes}, "the first one fills the buffers"


def test_few_numbers_of_tokens_are_captured_at_once() -> None:
    counts = [5, 5, 5, 5, 3, 3, 3, 3, 7, 6, 2, 2, 2, 2, 3, 3, 5, 5]

    def use(offload: Offload, model: Any) -> list[torch.Tensor]:
        cache, found = prompted(offload, model), []
        for at, count in enumerate(counts):
            found.append(verified(model, cache, count, 1, at))
            assert len({each.new_tokens for each in cache.state.engine.captured.values()}) <= 2
        assert not offload.stats.captures or (forms(cache, 5) and not forms(cache, 3))
        return found

    stats = outcomes("llama3", "resident", use)
    assert stats.captures == 4, "none of 6 and 7, and one of 5 again"
    assert stats.captured_verifications == 3 + 2


def test_short_prompts_are_no_passes() -> None:
    """Whoever asks for the last token's logits alone verifies nothing."""
    model = shared_model("llama3")
    with headinfer.attach(model, **SIMULATED) as offload:
        cache = prompted(offload, model)
        for _ in range(5):
            model(random_tokens(1, 4), **cache_argument(model, cache), logits_to_keep=1)
        for _ in range(5):
            model(random_tokens(1, 17), **cache_argument(model, cache))
        assert offload.stats.captures == 0


def test_on_the_cpu_passes_are_launched() -> None:
    model = shared_model("llama3")
    with headinfer.attach(model, device="cpu") as offload:
        cache = prompted(offload, model)
        passes(model, cache, 5)
        assert offload.stats.captures == 0


def test_passes_wait_for_a_share_that_is_settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """The share of passes is another than that of steps, and is sought in pieces."""
    model = shared_model("llama3")
    for notes in ("_NOTES", "_UNTRUE_NOTES"):
        monkeypatch.setattr(balance, notes, 1)
    launch_a_layer_ahead(monkeypatch)
    with headinfer.attach(model, **SIMULATED | PLACEMENTS["both"]) as offload:
        cache = prompted(offload, model)
        balances = cache.state.engine._balances
        balances.at(3).fixed = False  # as where a probe chose the share
        seen = []
        for at in range(25):
            verified(model, cache, 3, 1, at)
            seen.append((balances.at(3).settled, frozenset(forms(cache, 3))))
        assert seen[3] == (False, {Form.IN_PIECES})
        assert seen[-1] == (True, {Form.IN_PIECES, Form.STREAMED})
        assert balances.at(1).share == 0.5
        settled, stats = balances.at(3).share, offload.stats
        captures, before = stats.captures, stats.captured_verifications
        for at in range(12):  # past a page, whose first pass is launched
            verified(model, cache, 3, 3, at)
        assert balances.at(3).share == settled
        assert Form.STREAMED in forms(cache, 3)
        assert stats.captured_verifications - before >= 12 - 1 - 2 * (stats.captures - captures)


@pytest.mark.parametrize(
    ("edge", "placement"),
    [
        *((edge, "streamed") for edge in (Edge.TILE_FILLED, Edge.TILE_FREE)),
        pytest.param(Edge.STEP_READY, "streamed", marks=pytest.mark.slow),
        *((edge, "host") for edge in (Edge.QUERY_READY, Edge.SERVED, Edge.ANSWERED)),
    ],
)
def test_a_replay_that_waits_too_little_is_noticed(edge: Edge, placement: str) -> None:
    model, device = shared_model("llama3"), SimulatedDevice(seed=3)
    settings = {**SIMULATED, **PLACEMENTS[placement], "simulated_device": device}
    offload = headinfer.attach(model, **settings)
    cache = prompted(offload, model)
    passes(model, cache, 5)
    assert offload.stats.captured_verifications == 5 - NEW_KIND
    device.skipped_edges = frozenset({edge})
    with pytest.raises(HazardError):
        passes(model, cache, 20)
    device.skipped_edges = frozenset()
    device.synchronize()
    offload.detach()


@pytest.mark.parametrize("how", ["forward", "weight"])
def test_a_model_that_changes_between_plain_calls_is_seen(how: str) -> None:
    """Calls that nobody says to verify are launched, and steps behind them compared anew."""

    def use(offload: Offload, model: Any) -> list[torch.Tensor]:
        cache, found = prompted(offload, model), []
        head, forward, weight = model.lm_head, model.lm_head.forward, model.lm_head.weight
        for turn in range(3):
            if turn == 1 and how == "forward":
                head.forward = lambda hidden: -2 * forward(hidden)
            elif turn == 1:
                head.weight = torch.nn.Parameter(weight * -2, requires_grad=False)
            elif turn == 2:
                head.forward, head.weight = forward, weight
            for count in (3, 3, 3, 3, 1, 1, 1, 1):
                tokens = random_tokens(1, count, seed=turn)
                found.append(model(tokens, **cache_argument(model, cache)).logits.clone())
        del head.forward
        return [torch.cat(found, dim=1)]

    stats = outcomes("llama3", "resident", use)
    assert stats.captured_steps > 0
    assert stats.captured_verifications == 0


def test_replaced_weights_are_let_go_by_captures_of_other_numbers() -> None:
    model = tiny_model("llama3")
    with headinfer.attach(model, **SIMULATED) as offload:
        cache = prompted(offload, model)
        for count in (5, 3):
            for seed in range(5):
                verified(model, cache, count, 1, seed)
        assert offload.stats.captures == 2
        old = weakref.ref(model.lm_head.weight)
        model.lm_head.weight = torch.nn.Parameter(old() * -2, requires_grad=False)
        for seed in range(3):
            verified(model, cache, 3, 1, seed)
        gc.collect()
        assert old() is None
