"""Drafting behind a cache: what drafts give, and that passes give the same bits as without them."""

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache, PreTrainedModel

import headinfer
from captured import SIMULATED
from headinfer.device.simulated import SimulatedDevice
from headinfer.engine.ready import Form
from headinfer.engine.windows import WindowKeeper
from headinfer.errors import CacheStateError
from headinfer.finding.attention import LayerCall, attending_by
from headinfer.integration.calls import cache_argument
from headinfer.integration.model_shape import model_shape
from headinfer.kv.pair import KV
from headinfer.offload import Offload
from headinfer.plan.memory import draft_sink_tokens
from headinfer.plan.shape import LayerKind
from headinfer.schedule import route
from tiny_models import random_tokens, shared_model, tiny_model

PROMPT_TOKENS, DRAFT_TOKENS = 90, 21
DEVICES: dict[str, dict[str, Any]] = {
    "cpu": {"device": "cpu", "chunk_tokens": 32},
    "streamed": {
        "device": "simulated",
        "chunk_tokens": 32,
        "tile_heads": 1,
        "tile_tokens": 16,
        "resident_tokens": 12,
        "host_attention": 0.4,
    },
    "resident": {**SIMULATED, "chunk_tokens": 32},
}


@contextlib.contextmanager
def attached(model: PreTrainedModel, device: str, **options: Any) -> Iterator[Offload]:
    options = {**DEVICES[device], "draft_tokens": DRAFT_TOKENS, **options}
    with headinfer.attach(model, **options) as offload:
        yield offload


def logits(model: PreTrainedModel, cache: Any, *tokens: int) -> torch.Tensor:
    """Return the logits of a call with some tokens."""
    given: torch.Tensor = model(torch.tensor([tokens]), **cache_argument(model, cache)).logits
    return given


def prompted(model: PreTrainedModel, offload: Offload, tokens: int = PROMPT_TOKENS) -> Any:
    cache = offload.new_cache()
    model(random_tokens(1, tokens), **cache_argument(model, cache))
    return cache


def drafted(model: PreTrainedModel, cache: Any, count: int) -> list[torch.Tensor]:
    """Return the logits of some drafts."""
    with cache.drafting():
        return [logits(model, cache, 3 + at) for at in range(count)]


def masked(model: PreTrainedModel, past: int, count: int) -> list[torch.Tensor]:
    """Return the logits of drafts by a stock model that sees what drafts attend, by a mask."""
    cache = DynamicCache(config=model.config)
    model(random_tokens(1, past), **cache_argument(model, cache))
    kinds = [layer.kind for layer in model_shape(model).layers]
    sinks = draft_sink_tokens(DRAFT_TOKENS)

    def attend(call: LayerCall) -> torch.Tensor:
        (rows,) = call.blocks
        seen = call.seen[..., rows, :]
        if kinds[call.layer] is LayerKind.FULL:
            positions = torch.arange(call.keys.shape[2])
            newest = past - (DRAFT_TOKENS - sinks)
            seen = seen & ((positions < sinks) | (positions >= newest))
        return call.attended(call.weights(rows, seen))

    with attending_by(model, attend):
        return [logits(model, cache, 3 + at) for at in range(count)]


@pytest.mark.covering(most=2)
@pytest.mark.parametrize(
    ("name", "device"),
    [("llama3", "cpu"), ("gemma3", "streamed"), ("gemma3", "resident"), ("gpt-oss", "resident")],
)
def test_a_drafts_logits_are_those_of_a_masked_stock_model(name: str, device: str) -> None:
    model = shared_model(name)
    wanted = masked(model, PROMPT_TOKENS, 9)
    for capture in (False, True)[: 1 if device == "cpu" else 2]:
        with attached(model, device, capture=capture) as offload:
            cache = prompted(model, offload)
            for _ in range(2):  # the second time by a capture that is there
                for ours, stock in zip(drafted(model, cache, 9), wanted, strict=True):
                    torch.testing.assert_close(ours, stock, rtol=2e-4, atol=2e-4)


changes = st.lists(
    st.one_of(
        st.tuples(st.just("draft"), st.integers(1, 8)),
        st.tuples(st.just("pass"), st.sampled_from([1, 1, 2, 5, 9, 20])),
        st.tuples(st.just("crop"), st.integers(1, 9)),
        st.tuples(st.sampled_from(["select", "copy", "fork", "grow", "reset"]), st.just(0)),
    ),
    min_size=3,
    max_size=8,
)


@settings(max_examples=6, deadline=None, derandomize=True)
@given(
    name=st.sampled_from(["llama3", "gemma3"]),
    device=st.sampled_from(list(DEVICES)),
    sequence=changes,
)
def test_passes_give_the_same_bits_with_drafts_and_without(
    name: str, device: str, sequence: list[tuple[str, int]]
) -> None:
    model = shared_model(name)
    outputs: list[list[torch.Tensor]] = []
    for drafts in (False, True):
        outputs.append([])
        with attached(model, device, capture=drafts) as offload:
            cache = prompted(model, offload)
            for change, tokens in [*sequence, ("pass", 3)]:
                if change == "draft":
                    if drafts and cache.can_draft is None:
                        drafted(model, cache, tokens)
                elif change == "pass":
                    outputs[-1].append(logits(model, cache, *range(5, 5 + tokens)))
                else:
                    cache = changed(model, offload, cache, change, tokens)
                assert cache.token_ids.shape == (1, cache.get_seq_length())
    assert all(map(torch.equal, *outputs))


def changed(model: PreTrainedModel, offload: Offload, cache: Any, change: str, tokens: int) -> Any:
    """Return a cache that was changed in some way."""
    if change == "crop":
        cache.crop(-tokens)
    elif change == "select":
        cache.batch_select_indices(torch.tensor([0]))
    elif change == "grow":
        cache.batch_repeat_interleave(2)
        cache.batch_select_indices(torch.tensor([1]))
    elif change == "reset":
        cache.reset()
        model(random_tokens(1, 60, seed=3), **cache_argument(model, cache))
    else:
        other = copy.deepcopy(cache) if change == "copy" else cache.fork()
        cache.close()
        return other
    return cache


@pytest.mark.covering(most=1)
@pytest.mark.parametrize("device", ["streamed", "resident"])
def test_drafts_and_passes_are_captured_beside_each_other(device: str) -> None:
    model = shared_model("gemma3")
    outputs = []
    for capture in (False, True):
        with attached(model, device, capture=capture) as offload:
            cache, ours = prompted(model, offload), []
            for _ in range(4):
                ours += drafted(model, cache, 5)
                ours.append(logits(model, cache, 3, 4, 5))  # verifies
                ours += [logits(model, cache, 7 + at) for at in range(3)]
                before = offload.stats.captured_drafts
                ours += drafted(model, cache, 1)  # alone, it is worth a capture too
            outputs.append(ours)
            stats = offload.stats
            assert (stats.draft_steps, stats.decode_steps) == (24, 16)
            assert stats.draft_s > 0
            if not capture:
                assert stats.captures == stats.captured_drafts == 0
            elif device == "resident":
                assert stats.captures == 2
                # Launched, captured, compared: the first three. One more as tokens double to 128.
                assert stats.captured_drafts >= 24 - 3 - 1
                assert stats.captured_drafts == before + 1
                assert stats.captured_steps
    assert all(map(torch.equal, *outputs))


def test_weights_that_changed_between_turns_are_seen_by_drafts() -> None:
    model = shared_model("llama3")
    norm = model.model.norm.weight
    before, outputs = norm.data, []
    for capture in (False, True):
        with attached(model, "resident", capture=capture) as offload:
            cache, ours = prompted(model, offload), []
            try:
                for turn in range(2):
                    norm.data = before * (1 + turn)
                    model(random_tokens(1, 40, seed=turn), **cache_argument(model, cache))
                    ours += drafted(model, cache, 6)
            finally:
                norm.data = before
            outputs.append(ours)
    assert all(map(torch.equal, *outputs))


def test_lengths_and_stats_count_drafts_while_there_are_any() -> None:
    model = shared_model("gemma3")
    with attached(model, "streamed") as offload:
        cache = prompted(model, offload)
        ids, window = cache.token_ids, model.config.sliding_window
        with cache.drafting():
            for at in range(5):
                logits(model, cache, at)
                assert cache.get_seq_length() == PROMPT_TOKENS + at + 1
                sizes = [layer.get_mask_sizes(1) for layer in cache.layers]
                tokens = PROMPT_TOKENS + at + 2
                assert set(sizes) == {(tokens, 0), (window, tokens - window)}
        assert cache.get_seq_length() == PROMPT_TOKENS
        assert torch.equal(cache.token_ids, ids)
        assert (offload.stats.decode_steps, cache.stats.draft_steps) == (0, 5)
        assert cache.drafted_tokens == 0


@pytest.mark.parametrize(
    ("name", "options", "reason"),
    [
        ("llama3", {"draft_tokens": 0}, "its plan has no copies"),
        ("llama3", {"draft_tokens": 80}, "it has 90 tokens, and drafts are worth it from 112 on"),
        ("mistral-sliding", {}, "its layers see windows alone"),
        ("qwen3-next", {}, "its recurrent states cannot go back"),
    ],
)
def test_why_nothing_can_be_drafted(name: str, options: dict[str, Any], reason: str) -> None:
    model = shared_model(name)
    with attached(model, "streamed", **options) as offload:
        cache = prompted(model, offload)
        assert cache.can_draft.startswith(reason)
        with pytest.raises(CacheStateError, match=reason), cache.drafting():
            raise AssertionError("never")


def test_why_a_cache_cannot_draft_now() -> None:
    model = shared_model("llama3")
    with attached(model, "streamed") as offload:
        cache = offload.new_cache()
        assert cache.can_draft == "it has no tokens"
        model(random_tokens(2, 60), **cache_argument(model, cache))
        assert cache.can_draft == "it has 2 rows"
        cache.batch_select_indices(torch.tensor([1]))
        assert cache.can_draft is None
        cache.park()
        assert cache.can_draft == "it has no GPU memory now"
        cache.close()
        with pytest.raises(CacheStateError, match="was closed"):
            cache.can_draft  # noqa: B018


@pytest.mark.parametrize(
    "change",
    [
        lambda model, cache: cache.crop(-1),
        lambda model, cache: cache.reset(),
        lambda model, cache: cache.fork(),
        lambda model, cache: cache.park(),
        lambda model, cache: copy.deepcopy(cache),
        lambda model, cache: cache.layers[0].keys,
        lambda model, cache: cache.batch_repeat_interleave(2),
        lambda model, cache: logits(model, cache, 3, 4),
        lambda model, cache: [logits(model, cache, 3) for _ in range(32)],
        lambda model, cache: cache.drafting().__enter__(),
        lambda model, cache: model(
            torch.tensor([[3]]),
            attention_mask=(torch.arange(PROMPT_TOKENS + 2) > 0).long()[None],
            **cache_argument(model, cache),
        ),
    ],
)
def test_what_is_refused_between_drafts_leaves_the_cache_as_it_was(change: Any) -> None:
    model = shared_model("gemma3")
    with attached(model, "streamed", capture=False) as offload:
        cache = prompted(model, offload)
        with cache.drafting():
            logits(model, cache, 3)
            with pytest.raises(CacheStateError):
                change(model, cache)
        ours = logits(model, cache, 3, 4, 5)
        assert torch.equal(ours, logits(model, prompted(model, offload), 3, 4, 5))


def test_a_draft_that_stops_half_way_is_forgotten() -> None:
    model = shared_model("gemma3")

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with attached(model, "streamed") as offload:
        cache = prompted(model, offload)
        for layer in model.model.layers:
            hook = layer.register_forward_pre_hook(stop)
            with contextlib.suppress(KeyboardInterrupt), hook, cache.drafting():
                logits(model, cache, 3)
            assert cache.get_seq_length() == PROMPT_TOKENS
            drafted(model, cache, 2)
        ours = logits(model, cache, 3, 4, 5)
        assert torch.equal(ours, logits(model, prompted(model, offload), 3, 4, 5))


def test_a_new_cache_takes_no_memory_from_drafts_under_way() -> None:
    model = shared_model("llama3")
    with attached(model, "streamed") as offload:
        cache = prompted(model, offload)
        engine = cache.state.engine
        assert engine.can_give_up
        with cache.drafting():
            assert not engine.can_give_up
        assert engine.can_give_up


@pytest.mark.slow
def test_streamed_steps_are_replayed_between_drafts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their tiles stay in the buffers meanwhile, and their places in memory."""
    monkeypatch.setattr(route, "STEADY_TOKENS", 24)
    monkeypatch.setattr(route, "_STEADY_FROM", 0)
    model, outcomes = shared_model("llama3"), []
    for capture in (False, True):
        with attached(model, "streamed", capture=capture) as offload:
            cache, outputs = prompted(model, offload), []
            for turn in range(12):
                outputs += drafted(model, cache, 3)
                outputs.append(logits(model, cache, 5 + turn))
            forms = {key[1] for key in cache.state.engine.captured}
        outcomes.append(outputs)
    assert all(map(torch.equal, *outcomes))
    assert forms == {Form.STREAMED, Form.ONE_LAUNCH}


@pytest.mark.slow
def test_a_window_that_was_broken_off_while_it_began_anew_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    restart = WindowKeeper._restart

    def broken_off(keeper: WindowKeeper, *args: Any) -> None:
        def stop(*_: Any) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as patched:
            patched.setattr(KV, "copy_", stop)
            restart(keeper, *args)

    model = shared_model("gemma3")
    with attached(model, "cpu") as offload:
        cache = prompted(model, offload)
        monkeypatch.setattr(WindowKeeper, "_restart", broken_off)

        def go_on() -> None:
            for turn in range(400):
                drafted(model, cache, 3)
                logits(model, cache, turn % 90)

        with pytest.raises(KeyboardInterrupt):
            go_on()
        with pytest.raises(CacheStateError, match="interrupted"):
            logits(model, cache, 3)


def test_two_caches_draft_by_turns() -> None:
    model, outcomes = shared_model("gemma3"), []
    for apart in (True, False):
        with attached(model, "resident") as offload:
            caches = [prompted(model, offload, tokens) for tokens in (90, 120)]
            outputs: list[list[torch.Tensor]] = [[], []]
            for turn in range(3) if apart else ():
                for cache, ours in zip(caches, outputs, strict=True):
                    ours += [*drafted(model, cache, 3), logits(model, cache, turn, 3)]
            for turn in () if apart else range(3):
                with caches[0].drafting(), caches[1].drafting():
                    for at in range(3):
                        for cache, ours in zip(caches, outputs, strict=True):
                            ours.append(logits(model, cache, 3 + at))
                for cache, ours in zip(caches, outputs, strict=True):
                    ours.append(logits(model, cache, turn, 3))
        outcomes.append([*outputs[0], *outputs[1]])
    assert all(map(torch.equal, *outcomes))


def test_layers_on_several_devices_draft_alike() -> None:
    model, outcomes = shared_model("gemma3"), []
    for count in (1, 2):
        devices = [SimulatedDevice(seed=seed) for seed in range(count)]
        each = [devices[layer % count] for layer in range(model.config.num_hidden_layers)]
        with attached(model, "streamed", simulated_device=each) as offload:
            cache, outputs = prompted(model, offload), []
            for _ in range(3):
                outputs += drafted(model, cache, 6)
                outputs.append(logits(model, cache, 3, 4))
            assert offload.stats.captured_drafts > 10
        outcomes.append(outputs)
    assert all(map(torch.equal, *outcomes))


def test_heads_that_stream_go_on_in_drafts() -> None:
    model = shared_model("llama3")
    streaming = {"sparsity": 0.5, "head_pattern": "random", "sink_tokens": 3, "recent_tokens": 7}
    outputs: list[list[torch.Tensor]] = []
    for drafts in (False, True):
        outputs.append([])
        with attached(model, "streamed", **streaming) as offload:
            cache = prompted(model, offload)
            for count in (3, 1, 8):
                if drafts:
                    drafted(model, cache, 5)
                outputs[-1].append(logits(model, cache, *range(count)))
    assert all(map(torch.equal, *outputs))


def replace_weights(model: PreTrainedModel, how: str) -> None:
    layer, rotary = model.model.layers[0].mlp.down_proj, model.model.rotary_emb
    if how == "parameter":
        layer.weight = torch.nn.Parameter(layer.weight * -3, requires_grad=False)
    elif how == "data":
        layer.weight.data = layer.weight.data * -3
    else:
        rotary.inv_freq = rotary.inv_freq * 0.5


@pytest.mark.covering(most=2)
@pytest.mark.parametrize("how", ["parameter", "data", "buffer"])
@pytest.mark.parametrize("device", ["cpu", "resident"])
def test_drafts_are_of_the_weights_that_there_are(device: str, how: str) -> None:
    """Also where a pass that verifies drafts is all that lies between."""
    outputs = []
    for capture in (False, True):
        model, ours = tiny_model("llama3"), []
        with attached(model, device, capture=capture) as offload:
            cache = prompted(model, offload)
            for turn in range(6):
                if turn == 3:
                    replace_weights(model, how)
                ours += [logits(model, cache, turn, 4), *drafted(model, cache, 4)]
            assert (offload.stats.captured_drafts > 10) == capture
        outputs.append(ours)
    assert all(map(torch.equal, *outputs))
