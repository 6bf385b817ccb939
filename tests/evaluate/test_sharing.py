"""Several questions through one cache are answered as they are through caches of their own."""

import pytest
import torch
from answers_parts import TOKENIZER, answering

from headinfer.errors import MemoryPlanError, OptionError
from headinfer.evaluate.answers import rewinding
from headinfer.evaluate.scbench.sharing import requests, turns
from headinfer.integration.cache import OffloadedCache
from tiny_models import random_tokens, shared_model

METHODS_ALIKE = ["standard", "chunked-prefill", "headinfer"]
MODELS = ["llama3", "gemma2", "qwen3-next"]
"""Full attention; windows of 24 tokens between; and recurrent layers between."""


def words(tokens: int, seed: int) -> list[int]:
    return random_tokens(1, tokens, seed=seed)[0].tolist()


def generated(model, prompt: list[int], new_tokens: int) -> tuple[int, ...]:
    output = model.generate(
        torch.tensor([prompt]),
        max_new_tokens=new_tokens,
        do_sample=False,
        eos_token_id=TOKENIZER.eos_token_id,
    )
    return tuple(output[0, len(prompt) :].tolist())


# The second later turn is longer than a window.
PROMPTS = [words(90, 1), words(7, 2), words(40, 3), words(5, 4)]
MOST = [6, 9, 4, 7]


@pytest.mark.covering
@pytest.mark.parametrize("name", METHODS_ALIKE)
@pytest.mark.parametrize("family", MODELS)
def test_each_turn_is_answered_as_one_prompt_without_earlier_answers(family, name):
    model = shared_model(family)
    closed, answerer = answering(model, name, context_tokens=600)
    with closed:
        told = list(turns(answerer, PROMPTS, MOST, 400))
    asked: list[int] = []
    for number, (answer, measures) in enumerate(told):
        assert answer.kept_tokens == len(asked)
        assert answer.read_tokens == len(PROMPTS[number])
        asked += PROMPTS[number]
        assert answer.tokens == generated(model, asked, MOST[number]), number
        assert measures["reused_tokens"] == answer.kept_tokens
        assert measures["saved_s"] == pytest.approx(
            sum(earlier.prefill_s for earlier, _ in told[:number])
        )


@pytest.mark.covering
@pytest.mark.parametrize("name", METHODS_ALIKE)
@pytest.mark.parametrize("family", MODELS)
def test_each_request_is_answered_as_if_it_were_the_only_one(family, name):
    model = shared_model(family)
    context, *questions = [*PROMPTS, words(3, 5)]
    closed, answerer = answering(model, name, context_tokens=600)
    with closed:
        told = list(requests(answerer, [context, *questions], MOST, 400))
    for question, most, (answer, _) in zip(questions, MOST, told, strict=True):
        assert answer.tokens == generated(model, [*context, *question], most)
        assert (answer.kept_tokens, answer.read_tokens) == (len(context), len(question))
    measures = [each for _, each in told]
    assert [each["reused_tokens"] for each in measures] == [0, 90, 90, 90]
    assert measures[0]["context_s"] > 0
    assert [each["saved_s"] for each in measures] == [0.0] + [measures[0]["context_s"]] * 3


def asked_for_more_than_windows_keep_spare(ask, monkeypatch):
    """Return a window model's answers, as if its windows kept no spare tokens."""
    monkeypatch.setattr(rewinding, "SPARE_TOKENS", 0)
    model = shared_model("gemma2")
    prompts = PROMPTS if ask is turns else [*PROMPTS, words(3, 5)]
    closed, answerer = answering(model, "headinfer", context_tokens=600)
    with closed:
        told = list(ask(answerer, prompts, MOST, 400))
    for number, (answer, _) in enumerate(told):
        if ask is turns:
            whole = [token for prompt in prompts[: number + 1] for token in prompt]
        else:
            whole = [*prompts[0], *prompts[number + 1]]
        assert answer.tokens == generated(model, whole, MOST[number])
        assert answer.prompt_tokens == len(whole)
    return told


@pytest.mark.parametrize("ask", [turns, requests])
def test_windows_that_can_take_back_an_answer_are_not_copied(ask, monkeypatch):
    monkeypatch.setattr(OffloadedCache, "__deepcopy__", lambda *_given: pytest.fail("a copy"))
    closed, answerer = answering(shared_model("gemma2"), "headinfer", context_tokens=600)
    with closed:
        assert len(list(ask(answerer, PROMPTS, MOST[: 4 if ask is turns else 3], 400))) > 2


@pytest.mark.parametrize("ask", [turns, requests])
def test_windows_that_cannot_take_back_an_answer_are_copied(ask, monkeypatch):
    copies = []
    copied = OffloadedCache.__deepcopy__
    monkeypatch.setattr(
        OffloadedCache,
        "__deepcopy__",
        lambda cache, memo: copies.append(copied(cache, memo)) or copies[-1],
    )
    told = asked_for_more_than_windows_keep_spare(ask, monkeypatch)
    assert copies
    assert all(measures["reused_tokens"] for _, measures in told[1:])


@pytest.mark.covering(most=1)
@pytest.mark.parametrize("copies", [0, 1])
@pytest.mark.parametrize("ask", [turns, requests])
def test_without_memory_for_a_copy_everything_passes_again(ask, copies, monkeypatch):
    made = []
    copied = OffloadedCache.__deepcopy__

    def refused(cache, memo):
        if len(made) == copies:
            raise MemoryPlanError("no memory for a second cache")
        made.append(copied(cache, memo))
        return made[-1]

    monkeypatch.setattr(OffloadedCache, "__deepcopy__", refused)
    told = asked_for_more_than_windows_keep_spare(ask, monkeypatch)
    answer, measures = told[-1]
    assert (measures["reused_tokens"], measures["saved_s"]) == (0, 0)
    assert (answer.kept_tokens, answer.read_tokens) == (0, answer.prompt_tokens)


def test_a_first_turn_is_cut_so_that_all_turns_fit():
    model = shared_model("llama3")
    closed, answerer = answering(model, "standard", limit_tokens=400, context_tokens=600)
    with closed:
        told = list(turns(answerer, PROMPTS, MOST, 100))
    later = sum(map(len, PROMPTS[1:]))
    first = PROMPTS[0]
    left = [*first[: (100 - later) // 2], *first[-(100 - later) // 2 :]]
    assert len(left) == 100 - later
    assert told[0][0].read_tokens == len(left)
    assert told[0][0].tokens == generated(model, left, MOST[0])
    assert told[-1][0].kept_tokens + told[-1][0].read_tokens == 100


def test_a_method_with_less_memory_sees_less_of_the_shared_context():
    model = shared_model("llama3")
    closed, answerer = answering(model, "standard", limit_tokens=60, context_tokens=600)
    with closed:
        told = list(requests(answerer, [PROMPTS[0], words(7, 2), words(9, 3)], [5, 4], 400))
    kept = 60 - 9 - 5
    for answer, _ in told:
        assert answer.kept_tokens == kept
        assert answer.is_cut
    assert told[0][0].tokens == generated(
        model, [*PROMPTS[0][: kept // 2], *PROMPTS[0][-kept // 2 :], *words(7, 2)], 5
    )


def test_later_turns_that_leave_no_room_are_refused():
    closed, answerer = answering(shared_model("llama3"), "standard", context_tokens=600)
    with closed, pytest.raises(OptionError, match="leave no room"):
        list(turns(answerer, PROMPTS, MOST, 52))


def test_a_place_is_left_also_when_questions_are_broken_off(monkeypatch):
    closed_places = []
    close = rewinding.Place.close

    def noted(place):
        closed_places.append(place)
        close(place)

    monkeypatch.setattr(rewinding.Place, "close", noted)
    closed, answerer = answering(shared_model("gemma2"), "headinfer", context_tokens=600)
    with closed:
        asked = requests(answerer, PROMPTS, MOST[1:], 400)
        next(asked)
        asked.close()
    assert len(closed_places) == 1
