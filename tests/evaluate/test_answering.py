"""Greedy answers through one cache, held against stock's `generate`."""

import pytest
import torch
from answers_parts import TOKENIZER, answering

from headinfer.errors import OptionError
from headinfer.evaluate.answers.answering import cut_middle
from tiny_models import random_tokens, shared_model


@pytest.fixture(scope="module")
def model():
    return shared_model("llama3")


def generated(model, prompt: list[int], new_tokens: int) -> list[int]:
    """Return what stock generates, which ends where the model does."""
    output = model.generate(torch.tensor([prompt]), max_new_tokens=new_tokens, do_sample=False)
    return output[0, len(prompt) :].tolist()


def prompt_of(tokens: int, seed: int = 0) -> list[int]:
    return random_tokens(1, tokens, seed=seed)[0].tolist()


@pytest.mark.covering
@pytest.mark.parametrize("method", ["standard", "chunked-prefill", "head-wise-1", "headinfer"])
@pytest.mark.parametrize("tokens", [1, 37, 131])
def test_an_answer_is_what_stock_generates(model, method, tokens):
    prompt = prompt_of(tokens)
    expected = generated(model, prompt, 9)
    closed, answerer = answering(model, method)
    with closed:
        answer = answerer.answer(prompt, 9)
    assert list(answer.tokens) == expected
    assert len(answer.ties) == len(answer.tokens)
    assert (answer.prompt_tokens, answer.read_tokens, answer.kept_tokens) == (tokens, tokens, 0)
    assert not answer.is_cut
    assert answer.text == TOKENIZER.decode(expected, skip_special_tokens=True)


@pytest.mark.parametrize("method", ["standard", "headinfer"])
def test_a_second_turn_is_answered_as_if_all_had_been_one_prompt(model, method):
    first, second = prompt_of(50), prompt_of(11, seed=1)
    closed, answerer = answering(model, method)
    with closed:
        dialogue = answerer.dialogue(first, [([], 5), (second, 5)])
        one = dialogue.answer([], 5)
        two = dialogue.answer(second, 5)
    whole = [*first, *one.tokens, *second]
    assert list(two.tokens) == generated(model, whole, 5)
    assert two.kept_tokens == len(first) + len(one.tokens) - 1
    assert two.read_tokens == len(second) + 1
    assert two.prompt_tokens == len(whole)


@pytest.mark.parametrize("method", ["standard", "headinfer"])
def test_another_question_after_going_back_is_answered_as_if_it_were_the_first(model, method):
    context, questions = prompt_of(60), (prompt_of(7, seed=1), prompt_of(9, seed=2))
    closed, answerer = answering(model, method)
    with closed:
        dialogue = answerer.dialogue(context, [(each, 4) for each in questions])
        dialogue.read()
        place = dialogue.place(20)
        dialogue.answer(questions[0], 4)
        dialogue.go_back(place, again=False)
        answer = dialogue.answer(questions[1], 4)
    assert list(answer.tokens) == generated(model, [*context, *questions[1]], 4)
    assert (answer.kept_tokens, answer.read_tokens) == (60, 9)


def test_a_prompt_that_the_method_cannot_hold_is_cut_in_the_middle(model):
    prompt = prompt_of(100)
    closed, answerer = answering(model, limit_tokens=40)
    with closed:
        answer = answerer.answer(prompt, 7)
    assert list(answer.tokens) == generated(model, [*prompt[:17], *prompt[-16:]], 7)
    assert (answer.prompt_tokens, answer.read_tokens) == (100, 33)
    assert answer.is_cut


def test_a_stop_text_ends_an_answer_and_is_no_part_of_it(model):
    prompt = prompt_of(40)
    expected = generated(model, prompt, 8)
    words = TOKENIZER.decode(expected).split()
    stop = next(word for word in words if word != words[0])
    place = words.index(stop)
    closed, answerer = answering(model)
    with closed:
        answer = answerer.answer(prompt, 8, stop=(stop, "never"))
    assert list(answer.tokens) == expected[: place + 1]
    assert answer.text.split() == words[:place]


def test_a_token_that_ends_the_models_turn_ends_an_answer(model, monkeypatch):
    prompt = prompt_of(40)
    expected = generated(model, prompt, 6)
    monkeypatch.setattr(model.generation_config, "eos_token_id", [expected[2], 10**6])
    closed, answerer = answering(model)
    with closed:
        assert (
            list(answerer.answer(prompt, 6).tokens) == expected[: expected.index(expected[2]) + 1]
        )


def test_ties_are_told(model, monkeypatch):
    closed, answerer = answering(model)
    monkeypatch.setattr(answerer, "prefill", lambda *_given: torch.tensor([1.0, 3.0, 3.0, 2.0]))
    with closed:
        answer = answerer.answer([4, 5], 1)
    assert answer.tokens == (1,)
    assert answer.ties == (True,)


@pytest.mark.parametrize(
    ("most", "kept"),
    [(9, "abcdefg"), (7, "abcdefg"), (6, "abcefg"), (5, "abcfg"), (2, "ag"), (1, "a")],
)
def test_the_middle_is_cut(most, kept):
    assert cut_middle("abcdefg", most) == list(kept)


@pytest.mark.parametrize("most", [0, -3])
def test_a_prompt_of_nothing_is_refused(most):
    with pytest.raises(OptionError, match=f"cut to {most} tokens is none"):
        cut_middle([1, 2, 3], most)


def test_something_can_be_called_right_before_the_next_cache_and_once(model):
    closed, answerer = answering(model)
    told = []
    with closed:
        answerer.answer([4, 5], 1)
        answerer.before_next_cache(lambda: told.append("limit"))
        assert told == []
        answerer.answer([4, 5], 1)
        answerer.answer([4, 5], 1)
    assert told == ["limit"]
