"""OpenAI's own client against the real command with the embedded model."""

import json
from typing import Literal

import openai
import pytest
from openai import OpenAI
from pydantic import BaseModel
from server_parts import FACT, QUESTION, WAIT_S

MESSAGES = [{"role": "user", "content": f"{FACT} {QUESTION}"}]


class Box(BaseModel):
    open: bool
    name: Literal["phoenix", "otter"]


SCHEMA = {
    "type": "object",
    "properties": {"open": {"type": "boolean"}, "name": {"enum": ["phoenix", "otter"]}},
    "required": ["open", "name"],
    "additionalProperties": False,
}


def test_a_chat_answers_as_the_command_line_does(client: OpenAI, generate) -> None:
    answer = client.chat.completions.create(model="demo", messages=MESSAGES)
    assert answer.choices[0].message.content == generate("-p", MESSAGES[0]["content"])
    assert "41-27" in answer.choices[0].message.content
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_a_completion_answers_as_the_command_line_does(client: OpenAI, generate) -> None:
    prompt = f"{FACT} The strongbox of the mossy phoenix opens with"
    answer = client.completions.create(model="demo", prompt=prompt, max_tokens=7)
    assert answer.choices[0].text == generate("--raw", "-n", 7, "-p", prompt)
    assert answer.usage.completion_tokens <= 7


def test_the_stream_of_a_chat_says_what_the_whole_answer_says(client: OpenAI) -> None:
    whole = client.chat.completions.create(model="demo", messages=MESSAGES)
    with client.chat.completions.stream(
        model="demo", messages=MESSAGES, stream_options={"include_usage": True}
    ) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_completion()
    assert "content.delta" in kinds
    assert final.choices[0].message.content == whole.choices[0].message.content
    assert final.choices[0].finish_reason == whole.choices[0].finish_reason
    assert final.usage.completion_tokens == whole.usage.completion_tokens


def test_a_stream_has_usage_only_where_it_is_asked_for(client: OpenAI) -> None:
    chunks = list(client.chat.completions.create(model="demo", messages=MESSAGES, stream=True))
    assert all(chunk.usage is None for chunk in chunks)
    assert {chunk.id for chunk in chunks} == {chunks[0].id}


def test_the_same_prompt_again_is_not_read_again(client: OpenAI) -> None:
    text = " ".join(f"The strongbox of the tidy otter opens with {n}-10." for n in range(10, 60))
    first = client.completions.create(model="demo", prompt=text, max_tokens=3)
    again = client.completions.create(model="demo", prompt=text, max_tokens=3)
    assert first.usage.prompt_tokens_details.cached_tokens < 20  # other tests begin alike
    assert again.usage.prompt_tokens_details.cached_tokens >= again.usage.prompt_tokens - 1
    assert again.choices[0].text == first.choices[0].text


def test_a_response_and_its_stream(client: OpenAI) -> None:
    whole = client.responses.create(model="demo", input=f"{FACT} {QUESTION}")
    chat = client.chat.completions.create(model="demo", messages=MESSAGES)
    assert whole.output_text == chat.choices[0].message.content
    assert whole.status == "completed"
    with client.responses.stream(model="demo", input=f"{FACT} {QUESTION}") as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_response()
    assert final.output_text == whole.output_text
    assert final.usage.output_tokens == whole.usage.output_tokens
    assert kinds[0] == "response.created"
    assert kinds[-1] == "response.completed"
    assert "response.output_text.delta" in kinds


def test_a_response_that_is_cut_off_says_so(client: OpenAI) -> None:
    response = client.responses.create(model="demo", input=QUESTION, max_output_tokens=1)
    assert response.status == "incomplete"
    assert response.incomplete_details.reason == "max_output_tokens"


def test_items_of_a_response_are_a_conversation(client: OpenAI) -> None:
    items = [
        {"role": "user", "content": [{"type": "input_text", "text": FACT}]},
        {"type": "message", "role": "assistant", "content": "Yes."},
        {"role": "user", "content": QUESTION},
    ]
    response = client.responses.create(model="demo", input=items)
    messages = [{"role": "user", "content": FACT}, {"role": "assistant", "content": "Yes."}]
    messages.append({"role": "user", "content": QUESTION})
    chat = client.chat.completions.create(model="demo", messages=messages)
    assert response.usage.input_tokens == chat.usage.prompt_tokens
    assert response.output_text == chat.choices[0].message.content


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_follows_a_json_schema(client: OpenAI, stream: bool) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "box", "schema": SCHEMA}}
    given = {"model": "demo", "messages": MESSAGES, "response_format": form, "max_tokens": 300}
    if stream:
        chunks = client.chat.completions.create(**given, stream=True)
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    else:
        text = client.chat.completions.create(**given).choices[0].message.content
    said = json.loads(text)
    assert isinstance(said["open"], bool)
    assert said["name"] in ("phoenix", "otter")


def test_the_client_parses_what_follows_its_model(client: OpenAI) -> None:
    answer = client.chat.completions.parse(model="demo", messages=MESSAGES, response_format=Box)
    assert isinstance(answer.choices[0].message.parsed, Box)


def test_logprobs_are_those_of_the_answer(client: OpenAI) -> None:
    answer = client.chat.completions.create(
        model="demo", messages=MESSAGES, logprobs=True, top_logprobs=3
    )
    entries = answer.choices[0].logprobs.content
    assert "".join(entry.token for entry in entries) == answer.choices[0].message.content
    for entry in entries:
        assert len(entry.top_logprobs) == 3
        assert entry.logprob == entry.top_logprobs[0].logprob  # the likeliest was taken
        assert entry.logprob <= 0
    prompt = f"{FACT} The strongbox of the mossy phoenix opens with"
    told = client.completions.create(model="demo", prompt=prompt, logprobs=2, max_tokens=2)
    assert told.choices[0].logprobs.tokens == [" 41", "-27"]
    assert told.choices[0].logprobs.text_offset == [0, 3]
    assert all(len(top) == 2 for top in told.choices[0].logprobs.top_logprobs)


def test_choices_with_a_seed_are_repeatable_and_differ(endless_client: OpenAI) -> None:
    def ask(seed: int) -> list[str]:
        answer = endless_client.completions.create(
            model="endless", prompt="w1 w2", n=3, seed=seed, temperature=1.5, max_tokens=12
        )
        assert [choice.index for choice in answer.choices] == [0, 1, 2]
        assert answer.usage.completion_tokens == 36
        return [choice.text for choice in answer.choices]

    first = ask(5)
    assert len(set(first)) == 3
    assert ask(5) == first
    assert ask(50) != first


def test_several_prompts_at_once(client: OpenAI) -> None:
    prompts = [f"{FACT} The strongbox of the mossy phoenix opens with", "The otter"]
    together = client.completions.create(model="demo", prompt=prompts, max_tokens=5)
    alone = [
        client.completions.create(model="demo", prompt=prompt, max_tokens=5) for prompt in prompts
    ]
    assert [choice.text for choice in together.choices] == [
        answer.choices[0].text for answer in alone
    ]
    assert together.usage.prompt_tokens == sum(answer.usage.prompt_tokens for answer in alone)


def test_a_stop_string_is_no_part_of_the_answer(client: OpenAI) -> None:
    whole = client.chat.completions.create(model="demo", messages=MESSAGES)
    cut = client.chat.completions.create(model="demo", messages=MESSAGES, stop=["-27", "never"])
    text = whole.choices[0].message.content
    assert cut.choices[0].message.content == text[: text.index("-27")]
    assert cut.choices[0].finish_reason == "stop"


def test_biases_and_penalties_change_the_answer(endless_client: OpenAI) -> None:
    def ask(**settings) -> list[str]:
        answer = endless_client.completions.create(
            model="endless", prompt="w1 w2 w3", max_tokens=30, temperature=0, **settings
        )
        return answer.choices[0].text.split()

    plain = ask()
    assert ask(logit_bias={"7": 100}) == ["w1"] * 30  # the token after six special ones
    assert plain == ask(logit_bias={"7": 0.0})
    assert len(set(ask(frequency_penalty=2.0, presence_penalty=2.0))) > len(set(plain))


def test_the_model_is_listed(client: OpenAI) -> None:
    (model,) = client.models.list().data
    assert model.id == "demo"
    assert client.models.retrieve("demo").id == "demo"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("another")
    with pytest.raises(openai.NotFoundError, match="demo"):
        client.chat.completions.create(model="another", messages=MESSAGES)


def test_errors_are_those_the_client_knows(client: OpenAI, endless) -> None:
    picture = {"type": "image_url", "image_url": {"url": "data:image/png;base64,"}}
    shown = [{"role": "user", "content": [picture]}]
    tool = {"type": "function", "function": {"name": "look", "parameters": {}}}
    with pytest.raises(openai.BadRequestError, match="only text"):
        client.chat.completions.create(model="demo", messages=shown)
    with pytest.raises(openai.BadRequestError, match="tools"):
        client.chat.completions.create(model="demo", messages=MESSAGES, tools=[tool])
    stranger = OpenAI(base_url=f"{endless.url}/v1", api_key="wrong", max_retries=0, timeout=WAIT_S)
    with pytest.raises(openai.AuthenticationError):
        stranger.models.list()
