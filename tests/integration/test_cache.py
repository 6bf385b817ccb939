"""What users and transformers ask of a cache: the answers of stock's at the same state."""

import contextlib
import copy
import inspect
import io
import pickle
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

import headinfer
from headinfer.device.simulated import SimulatedDevice
from headinfer.errors import CacheStateError, MemoryPlanError
from headinfer.integration import parts
from headinfer.integration.cache import OffloadedCache
from headinfer.integration.calls import cache_argument
from headinfer.integration.layer import OffloadedLayer
from headinfer.plan.memory import SPARE_TOKENS
from tiny_models import random_tokens, shared_model

DEVICES: list[dict[str, Any]] = [
    {"device": "cpu"},
    {"device": "simulated", "resident_tokens": 0},
    {"device": "simulated", "resident_tokens": 20, "host_attention": 0.5},
    {"device": "simulated", "resident_tokens": "all"},
]
each_device = pytest.mark.parametrize("options", DEVICES, ids=["cpu", "link", "shared", "resident"])


def attached(model: PreTrainedModel, options: dict[str, Any]) -> headinfer.Offload:
    return headinfer.attach(model, chunk_tokens=16, tile_tokens=8, **options)


def feed(model: PreTrainedModel, cache: Cache, tokens: torch.Tensor, *steps: int) -> torch.Tensor:
    """Pass tokens through the model, so many at a time, and return the last logits."""
    logits = torch.empty(0)
    for part in tokens.split(list(steps) or tokens.shape[1], dim=1):
        logits = model(part, **cache_argument(model, cache)).logits
    return logits


@contextlib.contextmanager
def both(
    name: str, options: dict[str, Any], tokens: torch.Tensor, *steps: int
) -> Iterator[tuple[OffloadedCache, DynamicCache, PreTrainedModel]]:
    """Give our cache and stock's, filled alike, and the model, attached."""
    model = shared_model(name)
    stock = DynamicCache(config=model.config)
    feed(model, stock, tokens, *steps)
    with attached(model, options) as offload:
        ours = offload.new_cache()
        feed(model, ours, tokens, *steps)
        yield ours, stock, model


def assert_same_contents(ours: Any, stock: Any) -> None:
    ours, stock = list(ours), list(stock)
    assert len(ours) == len(stock)
    for mine, wanted in zip(ours, stock, strict=True):
        for part, right in zip(mine, wanted, strict=True):
            if right is None:
                assert part is None
            else:
                torch.testing.assert_close(part, right)


@pytest.mark.covering
@each_device
@pytest.mark.parametrize("name", ["llama3", "gemma3"])
def test_a_cache_is_read_out_and_goes_on(name: str, options: dict[str, Any]) -> None:
    tokens, more = random_tokens(2, 50), random_tokens(2, 3, seed=2)
    with both(name, options, tokens, 41, 1, 1, 3, 1, 1, 1, 1) as (ours, stock, model):
        assert ours.is_initialized
        assert_same_contents(ours, stock)
        read = DynamicCache(list(ours), config=model.config)
        assert_same_contents(DynamicCache(ours), DynamicCache(stock))
        wanted = feed(model, stock, more, 1, 2)
        torch.testing.assert_close(feed(model, ours, more, 1, 2), wanted)
        assert_same_contents(ours, stock)
        if name == "llama3":  # a window read out of stock does not know its length either
            assert read.get_seq_length() == 50
            torch.testing.assert_close(feed(model, read, more, 1, 2), wanted)


@pytest.mark.covering(most=2)
@each_device
def test_a_prompt_that_is_kept_in_pieces_is_read_in_order(options: dict[str, Any]) -> None:
    tokens = random_tokens(1, 400)
    with both("llama3", options, tokens, 20, 300, 80) as (ours, stock, _):
        assert_same_contents(ours, stock)
        for cache in (ours, stock):
            cache.crop(-390)
        assert_same_contents(ours, stock)


@each_device
def test_what_is_read_is_a_copy(options: dict[str, Any]) -> None:
    tokens, more = random_tokens(1, 40), random_tokens(1, 2, seed=2)
    with both("llama3", options, tokens, 39, 1) as (ours, stock, model):
        for keys, values, _ in ours:
            keys.fill_(torch.nan)
            values.fill_(torch.nan)
        torch.testing.assert_close(feed(model, ours, more), feed(model, stock, more))


def test_a_layer_is_read_between_the_layers_of_a_call() -> None:
    tokens, more = random_tokens(1, 40), random_tokens(1, 1, seed=2)
    with both("llama3", DEVICES[2], tokens) as (ours, stock, model):
        seen = []

        def read(*_: object) -> None:
            seen.append(ours.layers[1].keys)

        handle = model.model.layers[1].register_forward_hook(read)
        try:
            logits = feed(model, ours, more)
        finally:
            handle.remove()
        torch.testing.assert_close(logits, feed(model, stock, more))
        torch.testing.assert_close(seen[0], stock.layers[1].keys)


def test_reading_is_refused_where_the_host_memory_is_too_small(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with both("llama3", DEVICES[0], random_tokens(1, 64)) as (ours, _, _model):
        # 64 tokens of 4 heads of 16 float32 are 16 KiB, and as much once they are copied.
        monkeypatch.setattr(parts, "available_host_bytes", lambda: 20 * 2**10)
        with pytest.raises(
            MemoryPlanError, match=r"keys of 64 tokens .* need 32.00 KiB"
        ) as refusal:
            list(ours)
        assert "\n" not in str(refusal.value)
        monkeypatch.setattr(parts, "available_host_bytes", lambda: 32 * 2**10)
        list(ours)


class Card(SimulatedDevice):
    """A device that has so much memory free."""

    free: int | None = None

    def free_bytes(self) -> int | None:
        return self.free


def test_reading_is_refused_where_the_device_memory_is_too_small() -> None:
    card = Card()
    options = {"device": "simulated", "simulated_device": card}
    with both("llama3", options, random_tokens(1, 64)) as (ours, _, _model):
        card.free = 30 * 2**10
        with pytest.raises(MemoryPlanError, match="values of 64 tokens"):
            _ = ours.layers[1].values
        card.free = 40 * 2**10
        assert ours.layers[1].values.shape == (1, 4, 64, 16)


# What is asked of a whole cache and of a layer, with the arguments of each method that is no
# question alone. A method that is in neither must be looked at.
QUESTIONS: dict[str, list[tuple[Any, ...]]] = {
    "get_conv_state": [(0,)],
    "get_recurrent_state": [(0,)],
    "get_mask_sizes": [(1, 0), (5, 1), (5, 9)],
    "get_max_cache_shape": [(), (0,)],
    "get_max_length": [(), (0,), (1,), (9,)],
    "get_query_offset": [(), (1,)],
    "get_seq_length": [(), (0,), (1,), (9,)],
    "has_previous_state": [(), (0,)],
    "is_recording_past": [(0,), (1,)],
    "__len__": [()],
}
LAYER_QUESTIONS: dict[str, list[tuple[Any, ...]]] = {
    "get_mask_sizes": [(1,), (7,)],
    "get_max_cache_shape": [()],
    "get_max_length": [()],
    "get_seq_length": [()],
}
CHANGES = {
    "activate_past_recording",
    "batch_repeat_interleave",
    "batch_select_indices",
    "crop",
    "early_initialization",
    "lazy_initialization",
    "offload",
    "prefetch",
    "reorder_cache",
    "reset",
    "update",
    "update_conv_state",
    "update_indexer",
    "update_recurrent_state",
}
PARTICULAR = {"layers", "layer_class_to_replicate"}
"""Attributes that need not be equal: the layers are looked at one by one."""


def outcome(ask: Callable[[], Any]) -> Any:
    """Return an answer, or the kind of error."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return ask()
    except Exception as error:
        return type(error)


def answers(
    asked: Any, like: Any, base: type, questions: dict[str, list[tuple[Any, ...]]]
) -> dict[str, Any]:
    """Return all that a cache, or a layer, answers of what another has answers to."""
    found: dict[str, Any] = {}
    names = {name for name in (*dir(base), *vars(like)) if not name.startswith("_")}
    for name in sorted(names - PARTICULAR - CHANGES | set(questions)):
        if not hasattr(base, name) or not callable(inspect.getattr_static(base, name)):
            if name not in questions:  # a method that this transformers lacks
                found[name] = outcome(lambda name=name: getattr(asked, name))
            continue
        assert name in questions, f"{name} is new: is our answer right?"
        for arguments in questions[name]:
            found[f"{name}{arguments}"] = outcome(
                lambda name=name, arguments=arguments: getattr(asked, name)(*arguments)
            )
    return found


def assert_same_answers(ours: Cache, stock: Cache) -> None:
    asked: list[tuple[Any, Any, type, dict[str, list[tuple[Any, ...]]]]]
    asked = [(ours, stock, DynamicCache, QUESTIONS)]
    for layer, like in zip(ours.layers, stock.layers, strict=True):
        if isinstance(layer, OffloadedLayer):
            asked.append((layer, like, DynamicLayer, LAYER_QUESTIONS))
        else:
            assert type(layer) is type(like)
    for one, other, base, questions in asked:
        mine, wanted = (answers(each, other, base, questions) for each in (one, other))
        for name, right in wanted.items():
            if isinstance(right, torch.Tensor):
                torch.testing.assert_close(mine[name], right)
            else:
                assert mine[name] == right, name


@pytest.mark.covering
@pytest.mark.parametrize("options", [DEVICES[0], DEVICES[2]], ids=["cpu", "shared"])
@pytest.mark.parametrize("name", ["llama3", "gemma3", "qwen3-next"])
def test_every_answer_is_that_of_stock(name: str, options: dict[str, Any]) -> None:
    model = shared_model(name)
    stock = DynamicCache(config=model.config)
    with attached(model, options) as offload:
        ours = offload.new_cache()
        assert_same_answers(ours, stock)
        for length in (20, 1, 1):
            for cache in (ours, stock):
                feed(model, cache, random_tokens(2, length))
            assert_same_answers(ours, stock)
        for cache in (ours, stock):
            cache.reorder_cache(torch.tensor([1, 1]))
        assert_same_answers(ours, stock)
        if name != "qwen3-next":
            for cache in (ours, stock):
                cache.batch_repeat_interleave(2)
                cache.batch_select_indices(torch.tensor([0, 3, 1]))
                cache.crop(-3)
            assert_same_answers(ours, stock)
        if name == "llama3":
            for cache in (ours, stock):
                cache.crop(-100)
            assert ours.get_seq_length() == stock.get_seq_length() == 0
        ours.reset()
        assert not ours.is_initialized
        assert_same_answers(ours, DynamicCache(config=model.config))


def test_a_cache_that_is_initialised_early_answers_as_stock() -> None:
    model = shared_model("llama3")
    stock = DynamicCache(config=model.config)
    with attached(model, DEVICES[0]) as offload:
        ours = offload.new_cache()
        for cache in (ours, stock):
            cache.early_initialization(1, 4, 16, torch.float32, torch.device("cpu"))
        assert ours.is_initialized
        assert_same_answers(ours, stock)
        feed(model, ours, random_tokens(1, 10))
        assert ours.get_seq_length() == 10


@pytest.mark.parametrize("name", ["llama3", "gemma3"])
def test_crop_refuses_before_it_changes_anything(name: str) -> None:
    with both(name, DEVICES[0], random_tokens(1, 400)) as (ours, stock, _):
        for change, error in ((5, ValueError), (-300, CacheStateError)):
            if name == "gemma3" or error is ValueError:
                with pytest.raises(error):
                    ours.crop(change)
                assert_same_contents(ours, stock)


def test_a_window_can_be_cropped_also_where_stock_was_not_told_to_record() -> None:
    tokens = random_tokens(1, 100 + SPARE_TOKENS)
    for steps in ((), (90, 1, 1, 3, 1, 4)):
        with both("gemma3", DEVICES[0], tokens, *steps, tokens.shape[1] - sum(steps)) as (
            ours,
            _,
            model,
        ):
            ours.crop(-SPARE_TOKENS)
            stock = DynamicCache(config=model.config)
            feed(model, stock, tokens[:, :100])
            assert_same_contents(ours, stock)
            torch.testing.assert_close(
                feed(model, ours, tokens[:, 100:]), feed(model, stock, tokens[:, 100:])
            )


INDICES: list[Any] = [
    torch.tensor([2, 0]),
    torch.tensor([True, False, True]),
    [2, 0],
    (0, 2),
    [-1, 1],
    [True, False, True],
    (False, True, True),
    range(1, 3),
    range(3),
    [0],
    [1, 1, 1, 0],
    slice(0, 2),
    np.array([2, 1]),
    np.array([False, True, True]),
]


@pytest.mark.covering
@pytest.mark.parametrize("options", [DEVICES[0], DEVICES[2]], ids=["cpu", "shared"])
@pytest.mark.parametrize("name", ["llama3", "gemma3"])
def test_rows_are_chosen_by_whatever_indexes_an_axis(name: str, options: dict[str, Any]) -> None:
    model = shared_model(name)
    tokens = random_tokens(3, 20)
    with attached(model, options) as offload:
        for indices in INDICES:
            ours, stock = offload.new_cache(), DynamicCache(config=model.config)
            for cache in (ours, stock):
                feed(model, cache, tokens, 19, 1)
            ours.batch_select_indices(indices)
            stock.batch_select_indices(list(indices) if isinstance(indices, range) else indices)
            assert_same_contents(ours, stock)


@pytest.mark.parametrize("name", ["llama3", "gemma3"])
@pytest.mark.parametrize(
    ("indices", "error"),
    [([], ValueError), (1, ValueError), ([[0], [1]], ValueError), ([0, 3], IndexError)],
)
def test_rows_that_are_not_there_are_refused(name: str, indices: Any, error: type) -> None:
    with both(name, DEVICES[0], random_tokens(3, 20)) as (ours, stock, _):
        for change in (ours.batch_select_indices, ours.reorder_cache):
            with pytest.raises(error):
                change(indices)
        with pytest.raises(ValueError, match="not 0 times"):
            ours.batch_repeat_interleave(0)
        assert_same_contents(ours, stock)


@pytest.mark.covering
@each_device
@pytest.mark.parametrize("rows", [[1, 0], (1, 1), torch.tensor([0, 1]), [1, 0, 0]])
def test_rows_are_reordered_by_lists_too(rows: Any, options: dict[str, Any]) -> None:
    with both("gemma3", options, random_tokens(2, 30), 29, 1) as (ours, stock, model):
        ours.reorder_cache(rows)
        stock.reorder_cache(torch.as_tensor(rows))
        assert_same_contents(ours, stock)
        more = random_tokens(len(rows), 1, seed=3)
        torch.testing.assert_close(feed(model, ours, more), feed(model, stock, more))


def test_rows_that_stay_cost_nothing() -> None:
    with both("llama3", DEVICES[3], random_tokens(2, 30)) as (ours, stock, _):
        plan = ours.state.engine.plan
        ours.batch_repeat_interleave(1)
        ours.batch_select_indices([True, True])
        ours.reorder_cache([0, 1])
        assert ours.state.engine.plan is plan
        assert_same_contents(ours, stock)


def test_rows_of_states_are_chosen_and_repeated_too() -> None:
    """Stock's layers of linear attention have no method for it."""
    model = shared_model("qwen3-next")
    tokens, more = random_tokens(2, 20), random_tokens(3, 2, seed=2)
    stock = DynamicCache(config=model.config)
    feed(model, stock, tokens[[1, 1, 0]])
    with attached(model, DEVICES[0]) as offload:
        ours = offload.new_cache()
        feed(model, ours, tokens)
        ours.batch_repeat_interleave(2)
        ours.batch_select_indices((2, 3, 0))
        torch.testing.assert_close(feed(model, ours, more), feed(model, stock, more))


def test_one_layer_keeps_its_number_of_rows() -> None:
    with both("llama3", DEVICES[0], random_tokens(2, 20)) as (ours, stock, _):
        layer = ours.layers[0]
        layer.batch_repeat_interleave(1)
        layer.batch_select_indices([1, 0])
        layer.reorder_cache(torch.tensor([1, 0]))
        assert_same_contents(ours, stock)
        for change in (
            lambda: layer.batch_repeat_interleave(2),
            lambda: layer.batch_select_indices([0]),
            lambda: layer.reorder_cache(torch.tensor([0, 0, 0])),
        ):
            with pytest.raises(CacheStateError, match="by itself"):
                change()


def test_what_would_lose_tokens_is_refused_in_words() -> None:
    with both("llama3", DEVICES[0], random_tokens(1, 20)) as (ours, _, _model):
        layer = ours.layers[0]
        for refused, words in (
            (lambda: pickle.dumps(ours), "cannot be pickled"),
            (lambda: torch.save(ours, io.BytesIO()), "cannot be pickled"),
            (lambda: pickle.dumps(layer), "cannot be pickled"),
            (lambda: copy.copy(ours), "use copy.deepcopy"),
            (lambda: copy.copy(layer), "use copy.deepcopy"),
            (lambda: copy.deepcopy(layer), "use copy.deepcopy"),
            (lambda: setattr(layer, "keys", layer.keys[:, :, :5]), "cannot be set"),
            (lambda: setattr(layer, "values", None), "cannot be set"),
        ):
            with pytest.raises(CacheStateError, match=words):
                refused()


def test_tokens_given_by_hand_are_missed_by_nobody() -> None:
    with both("llama3", DEVICES[0], random_tokens(1, 20)) as (ours, _, _model):
        ours.update(torch.zeros(1, 4, 1, 16), torch.zeros(1, 4, 1, 16), 0)
        for use in (lambda: list(ours), lambda: copy.deepcopy(ours)):
            with pytest.raises(CacheStateError, match="not attended yet"):
                use()


@pytest.mark.parametrize("detach", [False, True])
def test_a_closed_cache_answers_nothing(detach: bool) -> None:
    model = shared_model("llama3")
    with attached(model, DEVICES[1]) as offload:
        ours = offload.new_cache()
        feed(model, ours, random_tokens(1, 20))
        if not detach:
            ours.close()
    for use in (
        ours.get_seq_length,
        ours.reset,
        lambda: list(ours),
        lambda: ours.crop(-1),
        lambda: ours.batch_select_indices([0]),
        lambda: ours.batch_repeat_interleave(2),
        lambda: ours.reorder_cache([0]),
        lambda: copy.deepcopy(ours),
    ):
        with pytest.raises(CacheStateError, match=r"closed|detached"):
            use()


@pytest.mark.covering
@pytest.mark.parametrize("name", ["llama3", "gemma3"])
@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": False},
        {"num_beams": 3},
        {"prompt_lookup_num_tokens": 3},
        {"num_beams": 2, "num_return_sequences": 2, "do_sample": True},
    ],
)
def test_generation_never_reads_a_layer_out(
    name: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = shared_model(name)

    def refuse(_layer: OffloadedLayer, _part: str) -> None:
        raise AssertionError("a layer was read out")

    monkeypatch.setattr(OffloadedLayer, "_read", refuse)
    with attached(model, DEVICES[0]) as offload:
        cache = offload.new_cache()
        for _turn in range(2):
            tokens = random_tokens(1, 40 + cache.get_seq_length())
            model.generate(tokens, max_new_tokens=5, **cache_argument(model, cache), **options)
            if options.get("num_beams"):
                break
