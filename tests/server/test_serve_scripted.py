"""What becomes of events that a test wrote down: tools, thoughts, slow chunks and failures."""

import json
import time
from types import SimpleNamespace

import httpx2
import openai
import pytest
from openai import OpenAI
from scripted import Pause, ScriptedDesk, ended, serving
from server_parts import WAIT_S, events, wait_until

from headinfer.errors import ContextLengthError, HeadInferError, MemoryPlanError, NotANumberError
from headinfer.server.served import Limits
from headinfer.serving.events import Piece, Progress, Queued, TokenScore
from saved_models import make_tokenizer

MESSAGES = [{"role": "user", "content": "w1 w2"}]
CALL = '<tool_call>\n{"name": "look", "arguments": {"place": "attic"}}\n</tool_call>'
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "look",
            "description": "Look somewhere.",
            "parameters": {"type": "object", "properties": {"place": {"type": "string"}}},
        },
    }
]
BODY = {"messages": MESSAGES}


def client_of(url: str) -> OpenAI:
    return OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=WAIT_S)


def in_pieces(text: str, size: int = 5) -> list[str]:
    return [text[start : start + size] for start in range(0, len(text), size)]


def test_calls_of_tools_and_thoughts_are_told_apart_from_what_is_said() -> None:
    text = f"<think>It is dark.</think>I look.{CALL}"
    with serving(ScriptedDesk(in_pieces(text))) as (url, _):
        client = client_of(url)
        whole = client.chat.completions.create(model="scripted", messages=MESSAGES, tools=TOOLS)
        with client.chat.completions.stream(
            model="scripted", messages=MESSAGES, tools=TOOLS
        ) as stream:
            for _event in stream:
                pass
            streamed = stream.get_final_completion()
    for answer in (whole, streamed):
        (choice,) = answer.choices
        assert choice.finish_reason == "tool_calls"
        assert choice.message.content == "I look."
        assert choice.message.reasoning_content == "It is dark."
        (call,) = choice.message.tool_calls
        assert call.function.name == "look"
        assert json.loads(call.function.arguments) == {"place": "attic"}
        assert call.id


def test_a_response_has_an_item_for_each_thought_message_and_call() -> None:
    text = f"<think>It is dark.</think>I look.{CALL}"
    tools = [{"type": "function", **TOOLS[0]["function"]}]
    with serving(ScriptedDesk(in_pieces(text))) as (url, _):
        client = client_of(url)
        whole = client.responses.create(model="scripted", input="w1", tools=tools)
        with client.responses.stream(model="scripted", input="w1", tools=tools) as stream:
            numbers = [event.sequence_number for event in stream]
            streamed = stream.get_final_response()
    assert numbers == list(range(len(numbers)))
    for response in (whole, streamed):
        thought, message, call = response.output
        assert thought.content[0].text == "It is dark."
        assert message.content[0].text == "I look."
        assert (call.name, json.loads(call.arguments)) == ("look", {"place": "attic"})


def test_a_call_that_is_no_json_is_told_as_it_is() -> None:
    text = "Well.<tool_call>\n{look: attic\n</tool_call> Done."
    with serving(ScriptedDesk(in_pieces(text))) as (url, _):
        answer = client_of(url).chat.completions.create(model="scripted", messages=MESSAGES)
    message = answer.choices[0].message
    assert message.tool_calls is None
    assert message.content.startswith("Well.")
    assert "{look: attic" in message.content
    assert message.content.endswith(" Done.")


def test_calls_between_special_tokens_are_found(tmp_path) -> None:
    from headinfer.demo.tokenizer import build_tokenizer
    from headinfer.server.parsing import Called, Said, Thought, needs_special, parser_of

    tokenizer = build_tokenizer()
    marks = ["<|tool_call>", "<tool_call|>", "<|channel>", "<channel|>", "<turn|>"]
    tokenizer.add_special_tokens({"additional_special_tokens": marks})
    model = SimpleNamespace(config=SimpleNamespace(model_type="gemma4"))
    assert needs_special(model, tokenizer, ())
    text = (
        "<|channel>thought\nDark — so.<channel|>I look."
        '<|tool_call>call:look{place:<|"|>attic<|"|>}<tool_call|>'
    )
    parser = parser_of(model, tokenizer, [], TOOLS, spelled=True)
    parts = []
    for token_id in tokenizer(text, add_special_tokens=False)["input_ids"]:
        parts += parser.take(Piece("", (TokenScore(token_id, "", 0.0, ()),)))
    parts += parser.end()
    said = "".join(part.text for part in parts if isinstance(part, Said))
    thought = "".join(part.text for part in parts if isinstance(part, Thought))
    (call,) = (part for part in parts if isinstance(part, Called))
    assert (said, thought) == ("I look.", "Dark — so.")
    assert (call.name, json.loads(call.arguments)) == ("look", {"place": "attic"})


def test_a_model_without_a_form_is_passed_on_as_it_is() -> None:
    with serving(ScriptedDesk(in_pieces(CALL)), model_type="llama") as (url, _):
        answer = client_of(url).chat.completions.create(model="scripted", messages=MESSAGES)
    assert answer.choices[0].message.content == CALL
    assert answer.choices[0].finish_reason == "stop"


def test_what_tools_answered_goes_to_the_model() -> None:
    desk = ScriptedDesk(["w3"])
    call = {"id": "c1", "type": "function", "function": {"name": "w7", "arguments": '{"a": 1}'}}
    conversation = [
        *MESSAGES,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "w9"},
    ]
    items = [
        {"role": "user", "content": "w1 w2"},
        {"type": "function_call", "call_id": "c1", "name": "w7", "arguments": '{"a": 1}'},
        {"type": "function_call_output", "call_id": "c1", "output": "w9"},
    ]
    with serving(desk) as (url, _):
        client_of(url).chat.completions.create(model="scripted", messages=conversation)
        client_of(url).responses.create(model="scripted", input=items)
        client_of(url).chat.completions.create(model="scripted", messages=MESSAGES, tools=TOOLS)
        client_of(url).chat.completions.create(
            model="scripted", messages=MESSAGES, tools=TOOLS, tool_choice="none"
        )
    with_answer, the_same, with_tools, without = (ask.ids for ask in desk.asks)
    assert with_answer == the_same
    assert len(with_answer) == 8  # <user> w1 w2 <user> w7 <user> w9 <assistant>
    assert len(with_tools) == len(without) + 2


def test_headers_progress_and_pings_come_while_one_chunk_takes_its_time() -> None:
    pause = Pause()
    script = [Queued(1), Queued(0), Progress(90, 30, 30, 5.0), pause, Progress(90, 30, 90, 9e3)]
    with serving(ScriptedDesk([*script, "w3"])) as (url, _):
        body = {**BODY, "stream": True, "return_progress": True}
        with httpx2.stream(
            "POST", f"{url}/v1/chat/completions", json=body, timeout=WAIT_S
        ) as response:
            lines, told, pings = response.iter_lines(), [], 0
            for line in lines:
                pings += line.startswith(": ping")
                if line.startswith("data: {"):
                    told.append(json.loads(line.removeprefix("data: ")))
                again = [chunk for chunk in told if "prompt_progress" in chunk]
                if pings > 2 and len(again) > 1:
                    break
            pause.until.set()
            rest = [line for line in lines if line.startswith("data: ")]  # pings may come between
    assert [chunk["queue_position"] for chunk in told if "queue_position" in chunk] == [1, 0]
    first, second = (chunk["prompt_progress"] for chunk in again[:2])
    assert first == {"total": 90, "cache": 30, "processed": 30, "time_ms": 5}
    assert second["processed"] == 30
    assert second["time_ms"] > 500
    assert any('"processed": 90' in line for line in rest)
    assert rest[-1] == "data: [DONE]"


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_cancels_what_it_asked(stream: bool) -> None:
    desk = ScriptedDesk([Progress(90, 0, 0, 0.0), Pause()])
    with serving(desk, ping_s=WAIT_S) as (url, _):
        with pytest.raises(httpx2.TimeoutException):
            httpx2.post(
                f"{url}/v1/completions", json={"prompt": "w1", "stream": stream}, timeout=0.5
            )
        wait_until(lambda: desk.tickets[0].cancelled.is_set())


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/v1/responses"])
def test_a_failure_in_the_middle_is_told_in_the_stream_and_the_server_goes_on(path: str) -> None:
    broken = NotANumberError("the model computes NaN; load it in another dtype")
    desk = ScriptedDesk(["w3 ", ended("error", error=broken)], ["w4"])
    body = {"messages": MESSAGES, "prompt": "w1", "input": "w1"}
    with serving(desk) as (url, _):
        with httpx2.stream("POST", url + path, json={**body, "stream": True}) as response:
            assert response.status_code == 200
            *_, last = events(response)
        error = last["response"]["error"] if "response" in last else last["error"]
        assert "NaN" in error["message"]
        assert httpx2.post(url + path, json=body).status_code == 200
        desk.scripts.append([ended("error", error=broken)])
        desk.scripts = desk.scripts[-1:]
        assert httpx2.post(url + path, json=body).status_code == 500


def test_the_client_hears_of_a_failure_in_the_stream() -> None:
    desk = ScriptedDesk(["w3 ", ended("error", error=NotANumberError("the model computes NaN"))])
    with serving(desk) as (url, _):
        chunks = client_of(url).chat.completions.create(
            model="scripted", messages=MESSAGES, stream=True
        )
        with pytest.raises(openai.APIError, match="NaN"):
            list(chunks)


@pytest.mark.parametrize("kind", [ContextLengthError, MemoryPlanError])
def test_what_does_not_fit_is_refused_before_the_stream_begins(kind: type[HeadInferError]) -> None:
    desk = ScriptedDesk(["w3"])
    desk.refuse = kind("the prompt needs 9 GiB of CPU memory, there are 4 GiB")
    with serving(desk) as (url, _):
        response = httpx2.post(f"{url}/v1/chat/completions", json={**BODY, "stream": True})
    assert response.status_code == 400
    assert "9 GiB" in response.json()["error"]["message"]
    assert response.json()["error"]["code"] == "context_length_exceeded"
    assert desk.asks == []


def test_a_request_has_only_so_much_time() -> None:
    desk = ScriptedDesk([Pause()], ["w3", Pause()])
    with serving(desk, limits=Limits(seconds=0.3)) as (url, _):
        late = httpx2.post(f"{url}/v1/chat/completions", json=BODY)
        assert late.status_code == 504
        assert late.json()["error"]["code"] == "timeout"
        cut = httpx2.post(f"{url}/v1/chat/completions", json=BODY).json()
    assert cut["choices"][0]["finish_reason"] == "length"
    assert cut["choices"][0]["message"]["content"] == "w3"
    assert all(ticket.cancelled.is_set() for ticket in desk.tickets)


def test_while_the_model_is_loading_the_server_says_so() -> None:
    with serving(None) as (url, service):
        assert httpx2.get(f"{url}/health").status_code == 503
        assert httpx2.get(f"{url}/health").json() == {"status": "loading"}
        asked = httpx2.post(f"{url}/v1/chat/completions", json=BODY)
        assert asked.status_code == 503
        assert "loading" in asked.json()["error"]["message"]
        assert int(asked.headers["retry-after"]) > 0
        assert "headinfer_ready 0.0" in httpx2.get(f"{url}/metrics").text
        service.close(1.0)
        assert httpx2.get(f"{url}/health").json() == {"status": "closing"}


def test_closing_ends_the_streams_with_a_word() -> None:
    desk = ScriptedDesk(["w3 ", Pause()])
    with (
        serving(desk) as (url, service),
        httpx2.stream(
            "POST", f"{url}/v1/chat/completions", json={**BODY, "stream": True}, timeout=WAIT_S
        ) as response,
    ):
        chunks = events(response)
        next(chunk for chunk in chunks if chunk["choices"][0]["delta"].get("content"))
        service.close(1.0)
        *_, last = chunks
    assert desk.closed
    assert last["error"]["code"] == "closing"


def test_an_error_nobody_foresaw_says_nothing_of_the_request(caplog, monkeypatch) -> None:
    desk = ScriptedDesk(["w3"], ["w4"])
    with serving(desk) as (url, _):
        with monkeypatch.context() as patched:

            def fail(_ask: object) -> None:
                raise TypeError("w1 w2 is a secret")

            patched.setattr(desk, "check", fail)
            response = httpx2.post(f"{url}/v1/chat/completions", json=BODY)
        assert response.status_code == 500
        assert "secret" not in response.text
        assert httpx2.post(f"{url}/v1/chat/completions", json=BODY).status_code == 200
    told = [record.getMessage() for record in caplog.records if "failed" in record.getMessage()]
    assert len(told) == 1
    assert "TypeError" in told[0]
    assert "secret" not in caplog.text


def test_choices_come_one_after_the_other() -> None:
    desk = ScriptedDesk(["w3"], ["w4"], ["w5"])
    with serving(desk) as (url, _):
        answer = client_of(url).completions.create(model="scripted", prompt="w1", n=3, seed=7)
        assert [choice.text for choice in answer.choices] == ["w3", "w4", "w5"]
        assert answer.usage.prompt_tokens == 5
        assert answer.usage.completion_tokens == 3
        assert answer.timings["predicted_n"] == 3
        assert answer.timings["predicted_ms"] == 750.0
        assert answer.timings["prompt_n"] == 3
    assert [ask.seed for ask in desk.asks] == [7, 8, 9]


@pytest.mark.parametrize(
    ("body", "given"),
    [
        ({}, {}),
        ({"temperature": 0, "top_p": 0.5}, {"do_sample": False}),
        ({"temperature": 0.5}, {"do_sample": True, "temperature": 0.5}),
        ({"top_k": 4, "min_p": 0.1}, {"do_sample": True, "top_k": 4, "min_p": 0.1}),
        ({"repetition_penalty": 1.5}, {"repetition_penalty": 1.5}),
        ({"logit_bias": {"7": 2}}, {"sequence_bias": [[[7], 2.0]]}),
    ],
)
def test_what_is_not_set_is_left_to_the_model(body: dict, given: dict) -> None:
    desk = ScriptedDesk(["w3"])
    with serving(desk) as (url, _):
        asked = {**BODY, **body, "max_completion_tokens": 9}
        assert httpx2.post(f"{url}/v1/chat/completions", json=asked).status_code == 200
    assert desk.asks[0].given == given | {"max_new_tokens": 9}


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ({"messages": 1}, "messages must be a list"),
        ({"messages": []}, "messages must be a list of at least 1"),
        ({}, "messages is missing"),
        ({**BODY, "temperature": "hot"}, "temperature must be a number"),
        ({**BODY, "temperature": -1}, "temperature must be at least 0"),
        ({**BODY, "max_tokens": 1.5}, "max_tokens must be a whole number"),
        ({**BODY, "stop": 7}, "stop must be text or a list"),
        ({**BODY, "stop": ["a", 7]}, "stop.1 must be text"),
        ({**BODY, "stream": "yes"}, "stream must be true or false"),
        ({"messages": [{"role": "user", "content": {}}]}, "messages.0.content must be text or a"),
        ({"messages": [{"role": "user", "content": [{}]}]}, "messages.0.content.0.type is missing"),
        ({**BODY, "response_format": {"type": "xml"}}, "response_format.type must be one of"),
        ({**BODY, "stream_options": 3}, "stream_options must be an object"),
    ],
)
def test_mistakes_are_told_in_plain_words(body: dict, told: str) -> None:
    with serving(ScriptedDesk(["w3"])) as (url, _):
        response = httpx2.post(f"{url}/v1/chat/completions", json=body)
    assert response.status_code == 400
    assert response.json()["error"]["message"].startswith(told)


CALL_ALONE = {"id": "c1", "type": "function", "function": {"name": "w7", "arguments": "{}"}}


@pytest.mark.parametrize(
    ("message", "told"),
    [
        ({"role": "user"}, "content is missing or null; a user message needs text"),
        ({"role": "user", "content": None}, "content is missing or null"),
        ({"role": "user", "content": []}, "content has no parts; a user message needs text"),
        ({"role": "system", "content": None}, "content is missing or null; a system message"),
        ({"role": "developer"}, "content is missing or null; a developer message"),
        ({"role": "assistant"}, "content is missing or null; an assistant message needs text or"),
        ({"role": "assistant", "tool_calls": []}, "content is missing or null"),
        ({"role": "tool", "tool_call_id": "c1"}, "content is missing or null; a tool message"),
        ({"role": "user", "content": [{"type": "text"}]}, "content.0.text is missing or null"),
        ({"role": "user", "content": [{"type": "image_url"}]}, "content.0: only text is served"),
        ({"role": "wizard", "content": "w1"}, "role must be one of system, developer, user"),
        ({"role": "assistant", "tool_calls": [{}]}, "tool_calls.0 needs a function with a name"),
    ],
)
def test_a_message_without_content_is_refused_by_its_place(message: dict, told: str) -> None:
    bodies = {
        "/v1/chat/completions": {"messages": [*MESSAGES, message]},
        "/slots/0?action=save": {"filename": "book", "messages": [*MESSAGES, message]},
    }
    with serving(ScriptedDesk(["w3"])) as (url, _):
        for path, body in bodies.items():
            response = httpx2.post(url + path, json=body)
            error = response.json()["error"]
            assert (response.status_code, error["param"]) == (400, "messages")
            assert error["message"].startswith(f"messages.{len(MESSAGES)}.{told}")


@pytest.mark.parametrize(
    "message",
    [
        {"role": "user", "content": ""},
        {"role": "assistant", "content": ""},
        {"role": "assistant", "tool_calls": [CALL_ALONE]},
        {"role": "assistant", "content": None, "tool_calls": [CALL_ALONE]},
        {"role": "assistant", "content": None, "reasoning_content": "w4"},
        {"role": "assistant", "content": None, "refusal": "w4"},
        {"role": "tool", "tool_call_id": "c1", "content": ""},
    ],
)
def test_a_message_may_say_nothing_where_its_role_lets_it(message: dict) -> None:
    with serving(ScriptedDesk(["w3"])) as (url, _):
        asked = {"messages": [*MESSAGES, message]}
        assert httpx2.post(f"{url}/v1/chat/completions", json=asked).status_code == 200


@pytest.mark.parametrize(
    ("item", "told"),
    [
        ({"role": "user"}, "content is missing or null; a user message needs text"),
        ({"role": "user", "content": 7}, "content must be text or a list"),
        ({"role": "user", "content": []}, "content has no parts"),
        ({"role": "user", "content": [{"type": "input_text"}]}, "content.0.text is missing"),
        ({"role": "wizard", "content": "w1"}, "role must be one of"),
        ({"type": "function_call"}, "name is missing"),
        ({"type": "function_call_output"}, "output is missing or no text"),
        ({"type": "picture"}, "type must be message, reasoning, function_call or"),
    ],
)
def test_an_item_without_content_is_refused_by_its_place(item: dict, told: str) -> None:
    with serving(ScriptedDesk(["w3"])) as (url, _):
        asked = {"input": [{"role": "user", "content": "w1"}, item]}
        response = httpx2.post(f"{url}/v1/responses", json=asked)
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, "input")
    assert error["message"].startswith(f"input.1.{told}")


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ({"prompt": []}, "prompt is an empty list; give text or token ids"),
        ({"prompt": ""}, "the model's tokenizer makes no tokens of this prompt; give some text"),
        ({"prompt": ["w1", ""]}, "prompt.1: the model's tokenizer makes no tokens of this"),
        ({"prompt": [[3], []]}, "prompt.1: the prompt is an empty list"),
        ({"prompt": ["w1"] * 33, "n": 2}, "prompt has 33 prompts and n is 2: 66 choices, and 64 "),
    ],
)
def test_a_prompt_that_is_empty_is_told_so(body: dict, told: str) -> None:
    with serving(ScriptedDesk(["w3"])) as (url, _):
        response = httpx2.post(f"{url}/v1/completions", json=body)
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, "prompt")
    assert error["message"].startswith(told)


def test_a_server_that_pings_by_the_clock_does_not_wait_for_the_desk() -> None:
    desk = ScriptedDesk([Pause()])
    with serving(desk) as (url, _):
        begun = time.monotonic()
        with httpx2.stream(
            "POST", f"{url}/v1/completions", json={"prompt": "w1", "stream": True}
        ) as response:
            assert next(line for line in response.iter_lines() if line).startswith(": ping")
        assert time.monotonic() - begun < WAIT_S / 2


@pytest.mark.parametrize("more", [{}, {"chat_template_kwargs": {"reasoning_effort": "w7"}}])
def test_an_effort_reaches_templates_that_know_it(more: dict) -> None:
    desk = ScriptedDesk(["w3"])
    tokenizer = make_tokenizer()
    wanted = "w7" if more else "w5"  # what is said of the template itself is taken
    with serving(desk, tokenizer=tokenizer) as (url, _):
        tokenizer.chat_template = "<user> {{ reasoning_effort }} {{ messages[0]['content'] }}"
        chat = {**BODY, "reasoning_effort": "w5", **more}
        response = {"input": "w1 w2", "reasoning": {"effort": "w5"}, **more}
        for path, body in (("chat/completions", chat), ("responses", response)):
            assert httpx2.post(f"{url}/v1/{path}", json=body).status_code == 200
    expected = tuple(tokenizer(f"<user> {wanted} w1 w2")["input_ids"])
    assert [ask.ids for ask in desk.asks] == [expected] * 2


@pytest.mark.parametrize("stream", [False, True])
def test_tokens_with_log_probabilities_keep_their_spaces(stream: bool) -> None:
    # Llama 2's tokenizers leave out the space of a token that is decoded alone.
    scores = [TokenScore(1, "w1", -0.5, ((1, "w1", -0.5),)), TokenScore(4, "\ufffd", -0.5, ())]
    desk = ScriptedDesk([Piece(" w1", (scores[0],)), Piece("", (scores[1],))])
    with serving(desk, tokenizer=spaced_tokenizer()) as (url, _):
        client = client_of(url)
        asked = {"model": "scripted", "logprobs": True, "top_logprobs": 1, "stream": stream}
        chat = client.chat.completions.create(messages=MESSAGES, **asked)
        asked = {"model": "scripted", "logprobs": 1, "stream": stream}
        text = client.completions.create(prompt="w1", **asked)
        chats = list(chat) if stream else [chat]
        texts = list(text) if stream else [text]
    told = [choice.logprobs for answer in chats for choice in answer.choices if choice.logprobs]
    entries = [entry for each in told for entry in each.content]
    assert [entry.token for entry in entries] == [" w1", "\ufffd"]
    assert [entry.bytes for entry in entries] == [[0x20, 0x77, 0x31], [0xE2]]
    assert entries[0].top_logprobs[0].token == " w1"
    told = [choice.logprobs for answer in texts for choice in answer.choices if choice.logprobs]
    assert [token for each in told for token in each.tokens] == [" w1", "\ufffd"]
    assert told[0].top_logprobs[0] == {" w1": -0.5}


def spaced_tokenizer():
    """Return a tokenizer in the way of Llama 2's, which writes bytes that it has no token for."""
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "\u2581w1", *(f"<0x{byte:02X}>" for byte in (0x20, 0x77, 0xE2))]
    inner = Tokenizer(models.WordLevel({word: at for at, word in enumerate(words)}, "<unk>"))
    inner.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", eos_token="<unk>")
