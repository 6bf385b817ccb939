"""Second questions over a shared prefix, to models whose caches cannot go back there."""

from typing import Any

import pytest
import torch
from scripted import TEMPLATE, model_server
from server_parts import Running

from headinfer.generation.prompt import encode_prompt, message_ends
from saved_models import make_tokenizer
from tiny_models import VOCAB, shared_model


def words(first: int, count: int) -> str:
    return " ".join(f"w{number % 59}" for number in range(first, first + 7 * count, 7))


BOOK = words(3, 401)
"""The window goes back by 256 tokens from the end of a question, which is not to its beginning."""


def tokenizer() -> Any:
    made = make_tokenizer(VOCAB)
    made.chat_template = TEMPLATE
    return made


def asked(question: str) -> list[dict[str, str]]:
    return [{"role": "system", "content": BOOK}, {"role": "user", "content": question}]


def ask(server: Running, question: str) -> tuple[str, int]:
    body = {"messages": asked(question), "max_tokens": 6, "repetition_penalty": 1.8}
    answer = server.post("/v1/chat/completions", temperature=0, **body).json()
    cached = answer["usage"]["prompt_tokens_details"]["cached_tokens"]
    return answer["choices"][0]["message"]["content"], cached


@pytest.mark.parametrize("name", ["gemma3", "qwen3-next"])
def test_a_second_question_goes_on_where_the_shared_message_ends(name: str) -> None:
    questions = (words(5, 350), words(11, 301))
    with model_server(shared_model(name), tokenizer()) as server:
        (first, nothing), (second, cached) = (ask(server, each) for each in questions)
    assert nothing == 0
    # <user> and the book; a window also goes back to here by some tokens, from a later snapshot.
    assert cached == 402 or (name == "gemma3" and cached == 403)
    for question, text in zip(questions, (first, second), strict=True):
        ids = encode_prompt(tokenizer(), asked(question))
        prompt = torch.tensor([ids])
        rows = shared_model(name).generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=6,
            do_sample=False,
            repetition_penalty=1.8,
        )
        stock = tokenizer().decode(rows[0, len(ids) :], skip_special_tokens=True)
        assert text == stock


def test_ends_are_those_of_the_first_message_and_of_the_newest() -> None:
    messages = [{"role": "user", "content": f"w{number} w1"} for number in range(20)]
    ends = message_ends(tokenizer(), messages, {})
    assert ends == (3, *range(36, 61, 3))
    assert message_ends(tokenizer(), messages[:1], {}) == (3,)
