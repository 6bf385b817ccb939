"""Captured decode steps: as stock generates, and to the last bit what is launched by kernel."""

import copy
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

import headinfer
from captured import (
    NEW_CACHE,
    NEW_KIND,
    NEW_TURN,
    SIMULATED,
    few,
    generated,
    launched,
    prompted,
    step,
    steps,
    stock_generated,
    with_and_without_capture,
)
from generation_modes import Result, compare
from headinfer.errors import CacheStateError
from headinfer.integration.calls import cache_argument
from headinfer.offload import Offload
from tiny_models import ARCHITECTURES, random_tokens, shared_model, tiny_model

NOT_CAPTURED = {"qwen3-next": "its linear attention keeps states of transformers' own"}
OF_EACH_KIND = ("llama3", "mistral-sliding", "gemma3", "gpt-oss", "qwen3-next")
WINDOWED = ("mistral-sliding", "gemma3", "gpt-oss")
NEW_TOKENS = 75
"""Past three pages of 64, and three restarts of a window."""


def assert_as_stock(ours: Any, stock: Any) -> None:
    prompt_tokens = stock.sequences.shape[1] - len(stock.logits)
    results = (Result(each.sequences, list(each.logits), prompt_tokens) for each in (ours, stock))
    assert compare(*results) == "equal"


@pytest.mark.covering(most=2)
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in OF_EACH_KIND else pytest.mark.slow)
        for name in ARCHITECTURES
    ],
)
def test_generate_equals_stock_and_launches_few_steps(name: str) -> None:
    model, tokens = shared_model(name), random_tokens(2, 70)
    options = {"max_new_tokens": NEW_TOKENS}
    outputs = []

    def use(offload: Offload) -> list[torch.Tensor]:
        outputs.append(generated(model, tokens, offload.new_cache(), **options))
        return [outputs[-1].sequences, *outputs[-1].logits]

    stats, _ = with_and_without_capture(model, use)
    assert_as_stock(outputs[-1], stock_generated(model, tokens, **options))
    assert stats.decode_steps == NEW_TOKENS - 1
    if name in NOT_CAPTURED:
        assert (stats.captures, stats.captured_steps) == (0, 0)
    else:
        assert (stats.captures, launched(stats)) == (1, few(70, NEW_TOKENS - 1))


@pytest.mark.covering(most=1)
@pytest.mark.parametrize("name", ["gpt-oss", "llama3", "gemma3"])
def test_bfloat16_is_captured_to_the_last_bit(name: str) -> None:
    model, tokens = tiny_model(name).bfloat16(), random_tokens(1, 70)

    def use(offload: Offload) -> list[torch.Tensor]:
        output = generated(model, tokens, offload.new_cache(), max_new_tokens=NEW_TOKENS)
        return [output.sequences, *output.logits]

    stats, _ = with_and_without_capture(model, use)
    assert launched(stats) == few(70, NEW_TOKENS - 1)


@pytest.mark.covering(most=2)
@pytest.mark.parametrize("batch", [1, 2, 3, 5, 8])
def test_batches_are_captured_each_for_itself(batch: int) -> None:
    model, tokens = shared_model("gemma3"), random_tokens(batch, 30, seed=batch)
    with headinfer.attach(model, **SIMULATED) as offload:
        other = generated(model, random_tokens(9 - batch, 20), offload.new_cache())
        ours = generated(model, tokens, offload.new_cache(), max_new_tokens=80)
        assert offload.stats.captures == 2
        assert launched(offload.stats) == few(20, 19) + few(30, 79)
    assert other.sequences.shape[0] == 9 - batch
    assert_as_stock(ours, stock_generated(model, tokens, max_new_tokens=80))


@pytest.mark.covering(most=3)
@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": True, "top_k": 20},
        {"do_sample": True, "top_p": 0.9, "temperature": 0.8, "num_return_sequences": 3},
        {"repetition_penalty": 1.3},
        {"num_beams": 3},
        {"num_beams": 2, "do_sample": True},
    ],
)
@pytest.mark.parametrize("name", ["llama3", "gemma3"])
def test_ways_of_choosing_tokens(name: str, options: dict[str, Any]) -> None:
    model, tokens = shared_model(name), random_tokens(1, 40)
    with headinfer.attach(model, **SIMULATED) as offload:
        ours = generated(model, tokens, offload.new_cache(), max_new_tokens=90, **options)
        assert launched(offload.stats) == few(40, 89)
    stock = stock_generated(model, tokens, max_new_tokens=90, **options)
    assert torch.equal(ours.sequences, stock.sequences)
    assert_as_stock(ours, stock)


class Collected(BaseStreamer):
    """A streamer that keeps what it is given."""

    def __init__(self) -> None:
        self.tokens: list[int] = []

    def put(self, value: torch.Tensor) -> None:
        self.tokens += value.flatten().tolist()

    def end(self) -> None:
        self.tokens.append(-1)


class StopAt(StoppingCriteria):
    """A criterion that looks at the tokens of each step."""

    def __init__(self, length: int) -> None:
        self.length = length
        self.seen: list[int] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_kwargs: Any) -> torch.Tensor:
        self.seen.append(int(input_ids[0, -1]))
        return torch.full((input_ids.shape[0],), input_ids.shape[1] >= self.length)


def test_streamers_and_stopping_criteria_hear_of_each_token() -> None:
    model, tokens = shared_model("llama3"), random_tokens(1, 40)
    streamer, criterion = Collected(), StopAt(100)
    with headinfer.attach(model, **SIMULATED) as offload:
        ours = generated(
            model,
            tokens,
            offload.new_cache(),
            max_new_tokens=200,
            streamer=streamer,
            stopping_criteria=StoppingCriteriaList([criterion]),
        )
        assert launched(offload.stats) == few(40, 59)
    assert ours.sequences.shape == (1, 100)
    assert streamer.tokens == [*ours.sequences[0].tolist(), -1]
    assert criterion.seen == ours.sequences[0, 40:].tolist()
    assert_as_stock(ours, stock_generated(model, tokens, max_new_tokens=60))


@pytest.mark.covering(most=1)
@pytest.mark.parametrize("name", ["llama3", *WINDOWED])
def test_the_next_cache_and_the_next_turn_launch_fewer_steps(name: str) -> None:
    model = shared_model(name)

    def use(offload: Offload) -> list[torch.Tensor]:
        outputs = []
        for conversation in range(2):
            cache, tokens = offload.new_cache(), random_tokens(1, 30, seed=conversation)
            for turn in range(3):
                output = generated(model, tokens, cache, max_new_tokens=40)
                outputs += [output.sequences, *output.logits]
                tokens = torch.cat((output.sequences, random_tokens(1, 9 + turn)), dim=1)
        return outputs

    stats, _ = with_and_without_capture(model, use)
    assert stats.decode_steps == 2 * 3 * 39
    turns = 30, 30 + 40 + 9, 30 + 40 + 9 + 40 + 10  # tokens before each turn's steps
    assert stats.captures == 2
    assert launched(stats) == sum(
        few(past, 39, begin=NEW_TURN if turn else begin)
        for begin in (NEW_KIND, NEW_CACHE)
        for turn, past in enumerate(turns)
    )


@pytest.mark.parametrize("name", ["llama3", "gemma3"])
def test_outputs_stay_as_they_were_handed_out(name: str) -> None:
    model = shared_model(name)
    with headinfer.attach(model, **SIMULATED) as offload:
        cache = prompted(offload, model)
        outputs = steps(model, cache, 10)
        before = [output.clone() for output in outputs]
        steps(model, cache, 5)
        assert launched(offload.stats) == NEW_KIND
    assert all(map(torch.equal, outputs, before))
    assert len({output.data_ptr() for output in outputs}) == 10


@pytest.mark.covering(most=1)
@pytest.mark.parametrize("name", ["llama3", "gemma3"])
def test_crop_then_going_on(name: str) -> None:
    model = shared_model(name)

    def use(offload: Offload) -> list[torch.Tensor]:
        cache, outputs = prompted(offload, model), []
        for removed in (1, 3, 7, 2):
            outputs += steps(model, cache, 30)
            cache.crop(-removed)
        return outputs

    stats, _ = with_and_without_capture(model, use)
    assert (stats.captures, launched(stats)) == (1, NEW_KIND + 2)  # and at 64 and 128 tokens


@pytest.mark.parametrize("name", ["llama3", "gemma3"])
def test_crop_of_all_then_another_prompt(name: str) -> None:
    model = shared_model(name)

    def use(offload: Offload) -> list[torch.Tensor]:
        cache, outputs = offload.new_cache(), []
        for prompt in (5, 6, 7):
            tokens = random_tokens(1, prompt)
            outputs.append(model(tokens, **cache_argument(model, cache)).logits)
            outputs += steps(model, cache, 6)
            cache.crop(-prompt - 6)
        return outputs

    stats, _ = with_and_without_capture(model, use)
    begin = NEW_TURN if stats.captures == 1 else NEW_CACHE  # a window has other memory then
    assert launched(stats) == few(5, 6) + few(6, 6, begin=begin) + few(7, 6, begin=begin)


def test_steps_at_the_same_length_alone_make_no_capture_trusted() -> None:
    """Only a token later is it known that no number was kept."""
    model = shared_model("llama3")

    def use(offload: Offload) -> list[torch.Tensor]:
        cache, outputs = prompted(offload, model), []
        for _ in range(4):
            outputs += steps(model, cache, 1)
            cache.crop(-1)
        return outputs

    stats, _ = with_and_without_capture(model, use)
    assert (stats.captures, stats.captured_steps) == (1, 0)


@pytest.mark.covering(most=1)
@pytest.mark.parametrize("name", ["llama3", "gemma3"])
def test_rows_that_change_places_between_steps(name: str) -> None:
    model = shared_model(name)
    ids = {"input_ids": torch.tensor([[5], [6], [7]])}

    def use(offload: Offload) -> list[torch.Tensor]:
        cache, outputs = prompted(offload, model, rows=3), []
        outputs += steps(model, cache, 5, **ids)
        cache.batch_select_indices(torch.tensor([2, 0, 0]))
        outputs += steps(model, cache, 80, **ids)
        cache.reorder_cache(torch.tensor([1, 2, 0]))
        outputs += steps(model, cache, 5, **ids)
        cache.batch_select_indices(torch.tensor([1, 0]))
        outputs += steps(model, cache, 5, input_ids=ids["input_ids"][:2])
        return outputs

    stats, _ = with_and_without_capture(model, use)
    of_three, of_two = few(40, 90), NEW_KIND - 1  # a step of other rows came just before
    assert (stats.captures, launched(stats)) == (2, of_three + of_two)


@pytest.mark.parametrize("name", ["llama3", "gpt-oss"])
def test_a_copied_cache_goes_on_by_itself(name: str) -> None:
    model = shared_model(name)

    def use(offload: Offload) -> list[torch.Tensor]:
        cache = prompted(offload, model)
        outputs = steps(model, cache, 10)
        copied = copy.deepcopy(cache)
        for _ in range(3):
            outputs += steps(model, copied, 4, position_ids=None)
            outputs.append(step(model, cache, 50))
        copied.close()
        return outputs + steps(model, cache, 5)

    stats, _ = with_and_without_capture(model, use)
    assert (stats.captures, launched(stats)) == (2, NEW_KIND + NEW_CACHE)


def test_reset_and_use_again() -> None:
    model = shared_model("gemma3")

    def use(offload: Offload) -> list[torch.Tensor]:
        cache, outputs = prompted(offload, model), []
        for _ in range(3):
            outputs += steps(model, cache, 10)
            cache.reset()
            outputs.append(step(model, cache, input_ids=random_tokens(1, 20)))
        return outputs

    stats, _ = with_and_without_capture(model, use)
    assert (stats.captures, launched(stats)) == (3, NEW_KIND + 2 * NEW_CACHE)


@pytest.mark.slow
def test_a_cache_that_outgrows_what_is_resident_goes_on() -> None:
    model = shared_model("llama3")

    def use(offload: Offload) -> list[torch.Tensor]:
        return steps(model, prompted(offload, model), 200)

    outcomes = []
    for capture in (False, True):
        options = {**SIMULATED, "resident_tokens": 100}
        with headinfer.attach(model, **options, capture=capture) as offload:
            outcomes.append(use(offload))
    assert all(map(torch.equal, *outcomes))
    # In one launch while all is resident, and in pieces from then on, behind a step in a row.
    # One more, which sends a page home, could not be compared.
    stats, again = offload.stats, 2  # at 64 and 128 tokens
    assert (launched(stats), stats.captures) == (NEW_KIND + NEW_KIND - 1 + 1 + again, 2)


def test_two_caches_alternate() -> None:
    model = shared_model("gemma3")

    def use(offload: Offload) -> list[torch.Tensor]:
        caches = [prompted(offload, model, seed=seed) for seed in (1, 2)]
        return [step(model, caches[at % 2], 3 + at % 50) for at in range(160)]

    stats, _ = with_and_without_capture(model, use)
    assert stats.captures == 2
    assert launched(stats) == 2 * few(40, 80)  # both began before one was known to serve


def test_dropping_one_of_two_caches_leaves_the_other() -> None:
    model = shared_model("llama3")

    def use(offload: Offload) -> list[torch.Tensor]:
        first, second = (prompted(offload, model, seed=seed) for seed in (1, 2))
        outputs = steps(model, first, 5) + steps(model, second, 5)
        first.close()
        return outputs + steps(model, second, 80)

    stats, _ = with_and_without_capture(model, use)
    assert launched(stats) == NEW_KIND + few(40, 85, begin=NEW_CACHE)


def test_padding_is_launched_and_right() -> None:
    model, tokens = shared_model("llama3"), random_tokens(2, 40)
    mask = torch.ones_like(tokens)
    mask[0, :11] = 0
    options = {"attention_mask": mask, "do_sample": False, "max_new_tokens": 30}
    with headinfer.attach(model, **SIMULATED) as offload:
        ours = model.generate(tokens, **cache_argument(model, offload.new_cache()), **options)
        assert (offload.stats.decode_steps, offload.stats.captures) == (29, 0)
    assert torch.equal(ours, model.generate(tokens, **options))


def test_a_mask_of_ones_is_none() -> None:
    model = shared_model("llama3")

    def use(offload: Offload) -> list[torch.Tensor]:
        cache, outputs = prompted(offload, model), []
        for at in range(30):
            mask = {} if at % 3 else {"attention_mask": torch.ones(1, 41 + at).long()}
            outputs.append(step(model, cache, **mask))
        return outputs

    stats, _ = with_and_without_capture(model, use)
    # With a mask, and without one: each is captured, compared, and compared behind 64 tokens.
    assert (stats.captures, launched(stats)) == (2, 1 + 2 * 3)


def test_a_mask_for_other_tokens_is_refused_as_ever() -> None:
    model = shared_model("llama3")
    with headinfer.attach(model, **SIMULATED) as offload:
        cache = prompted(offload, model)
        for at in range(4):
            step(model, cache, attention_mask=torch.ones(1, 41 + at).long())
        assert offload.stats.captured_steps == 4 - NEW_KIND
        with pytest.raises(CacheStateError, match="for 7 and not for 45"):
            step(model, cache, attention_mask=torch.ones(1, 7).long())


@pytest.mark.parametrize(
    "arguments",
    [
        {"output_hidden_states": True},
        {"return_dict": True},
        {"logits_to_keep": 1},
        {"logits_to_keep": torch.tensor([0])},
        {"use_cache": True},
    ],
)
def test_arguments_of_calls(arguments: dict[str, Any]) -> None:
    model = shared_model("gemma3")

    def use(offload: Offload) -> list[torch.Tensor]:
        cache, outputs = prompted(offload, model), []
        for token in range(3, 13):
            new = {"input_ids": torch.full((1, 1), token)}
            output = model(**new, **cache_argument(model, cache), **arguments)
            assert output[next(iter(cache_argument(model, cache)))] is cache
            outputs += [output.logits, *(output.hidden_states or ())]
        return outputs

    stats, outputs = with_and_without_capture(model, use)
    assert launched(stats) == NEW_KIND
    assert (len(outputs) > 10) == ("output_hidden_states" in arguments)


def test_return_dict_false_gives_tuples() -> None:
    model = shared_model("llama3")

    def use(offload: Offload) -> list[torch.Tensor]:
        cache, outputs = prompted(offload, model), []
        for token in range(3, 13):
            new = torch.full((1, 1), token)
            output = model(new, **cache_argument(model, cache), return_dict=False)
            assert isinstance(output, tuple)
            assert output[1] is cache
            outputs.append(output[0])
        return outputs

    stats, _ = with_and_without_capture(model, use)
    assert launched(stats) == NEW_KIND


def test_embeddings_instead_of_tokens() -> None:
    model = shared_model("llama3")
    embed = model.get_input_embeddings()

    def use(offload: Offload) -> list[torch.Tensor]:
        cache = prompted(offload, model)
        return [
            step(model, cache, inputs_embeds=embed(torch.full((1, 1), token)))
            for token in range(3, 13)
        ] + steps(model, cache, 5)

    stats, _ = with_and_without_capture(model, use)
    assert (stats.captures, launched(stats)) == (2, 2 * NEW_KIND - 1)


def test_outputs_of_no_dimension() -> None:
    model = shared_model("mixtral")

    def use(offload: Offload) -> list[torch.Tensor]:
        cache, outputs = prompted(offload, model), []
        for token in range(3, 13):
            new = torch.full((1, 1), token)
            output = model(new, **cache_argument(model, cache), output_router_logits=True)
            outputs += [output.aux_loss, *output.router_logits]
        return outputs

    stats, outputs = with_and_without_capture(model, use)
    assert outputs[0].ndim == 0
    assert launched(stats) == NEW_KIND


def test_inference_mode_and_no_grad_alternate() -> None:
    model = shared_model("gemma3")

    def use(offload: Offload) -> list[torch.Tensor]:
        with torch.inference_mode():
            cache = prompted(offload, model)
        outputs = []
        for at in range(24):
            with torch.inference_mode() if at % 3 else torch.no_grad():
                outputs.append(step(model, cache, 3 + at))
        return outputs

    stats, _ = with_and_without_capture(model, use)
    assert (stats.captures, launched(stats)) == (2, 2 * NEW_KIND - 1)


def test_autocast_whose_casts_go_after_each_step() -> None:
    model = tiny_model("llama3").requires_grad_(True)  # autocast keeps casts of such weights alone
    head = model.lm_head.weight
    before = head.detach().clone()

    def use(offload: Offload) -> list[torch.Tensor]:
        head.data.copy_(before)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            cache = prompted(offload, model)
        outputs = []
        for token in range(3, 23):
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
                outputs.append(step(model, cache, token))
                assert torch.is_autocast_cache_enabled()
            head.data.mul_(1.1)
        return outputs

    stats, _ = with_and_without_capture(model, use)
    assert launched(stats) == NEW_KIND


def test_positions_that_the_user_gives_are_followed() -> None:
    model = shared_model("llama3")
    given = [40, 41, 42, 7, 3, 43, 100, 0, 44, 45]

    def run(cache: Any) -> list[torch.Tensor]:
        return [step(model, cache, position_ids=torch.tensor([[place]])) for place in given]

    with headinfer.attach(model, **SIMULATED) as offload:
        ours = run(prompted(offload, model))
        assert launched(offload.stats) == NEW_KIND
    cache = stock_cache(model)
    for got, want in zip(ours, run(cache), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def stock_cache(model: PreTrainedModel) -> Any:
    return model(random_tokens(1, 40), use_cache=True)[next(iter(cache_argument(model, None)))]
