"""Raw requests, as curl sends them, against the real command."""

import http.client
import re
import time

import httpx2
import pytest
from server_parts import FACT, QUESTION, WAIT_S, events, in_thread, wait_until

CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"
MESSAGES = [{"role": "user", "content": f"{FACT} {QUESTION}"}]
LONG = " ".join(
    f"The strongbox of the mossy phoenix opens with 41-{n % 90 + 10}." for n in range(900)
)


def endless_stream(endless, **more):
    return endless.stream(TEXT, prompt="w1 w2", max_tokens=200_000, **more)


def begin(lines) -> None:
    """Read until the answer begins."""
    for line in lines:
        if line.startswith("data: ") and '"text": ""' not in line:
            return


def test_progress_and_pings_come_while_the_prompt_is_read(server) -> None:
    told, pings, first_text = [], 0, None
    with server.stream(TEXT, prompt=LONG, return_progress=True, max_tokens=4) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = list(response.iter_lines())
    for number, line in enumerate(lines):
        pings += line.startswith(": ping")
        if "prompt_progress" in line:
            told.append(dict(re.findall(r'"(\w+)": (\d+)', line.split("prompt_progress")[1])))
        elif '"text": "' in line and '"text": ""' not in line and first_text is None:
            first_text = number
    done = [int(each["processed"]) for each in told]
    assert len(set(done)) > 5
    assert done == sorted(done)
    assert {each["total"] for each in told} == {str(done[-1])}
    assert pings
    assert lines[-2:] == ["data: [DONE]", ""] or "data: [DONE]" in lines


def test_a_chat_tells_progress_only_where_it_is_asked_for(server) -> None:
    for asked in (True, False):
        with server.stream(CHAT, messages=MESSAGES, return_progress=asked) as response:
            told = [chunk for chunk in events(response) if "prompt_progress" in chunk]
        assert bool(told) is asked
    assert set(server.post(CHAT, messages=MESSAGES).json()["timings"]) >= {"cache_n", "prompt_ms"}


@pytest.mark.parametrize("asked", ["stream", "whole"])
def test_a_client_that_goes_away_stops_its_request(endless, asked: str) -> None:
    if asked == "stream":
        with endless_stream(endless) as response:
            lines = response.iter_lines()
            begin(lines)
            assert [slot["state"] for slot in endless.slots()].count("running") == 1
    else:
        with pytest.raises(httpx2.TimeoutException):
            httpx2.post(
                endless.url + TEXT,
                json={"prompt": "w1", "max_tokens": 200_000},
                headers=endless.headers,
                timeout=1.0,
            )
    endless.wait_idle()
    assert endless.post(TEXT, prompt="w1", max_tokens=3).status_code == 200


def test_who_waits_is_told_the_place_and_who_cannot_wait_is_refused(endless) -> None:
    with endless_stream(endless) as first:
        lines = first.iter_lines()  # which closes the stream once it is dropped
        begin(lines)
        with endless_stream(endless, return_progress=True) as second:
            chunks = events(second)
            assert next(chunks)["queue_position"] == 0
            refused = endless.post(TEXT, prompt="w1", max_tokens=1)
            assert refused.status_code == 429
            assert refused.json()["error"]["code"] == "queue_full"
            assert int(refused.headers["retry-after"]) > 0
            waiting = [slot for slot in endless.slots() if slot["state"] == "waiting"]
            assert [slot["queue_position"] for slot in waiting] == [0]
            first.close()
            assert any(chunk["choices"][0]["text"] for chunk in chunks)
    endless.wait_idle()


def test_a_slot_tells_how_far_its_request_is(endless) -> None:
    with endless_stream(endless) as response:
        lines = response.iter_lines()
        begin(lines)
        (slot,) = (slot for slot in endless.slots() if slot["state"] == "running")
        assert slot["prompt_progress"]["total"] == 2
        assert slot["is_processing"] is True
        wait_until(lambda: endless.slots()[0]["completion_tokens"] > 2)
    endless.wait_idle()


@pytest.mark.parametrize("path", ["/v1/models", "/slots", "/metrics", "/openapi.json", "/nothing"])
def test_without_a_key_nothing_is_told(endless, path: str) -> None:
    for headers in ({}, {"Authorization": "Bearer secre"}, {"Authorization": "Basic secret"}):
        response = httpx2.get(endless.url + path, headers=headers)
        assert response.status_code == 401
        assert response.json()["error"]["type"] == "authentication_error"
    assert httpx2.get(endless.url + path, headers={"X-Api-Key": "secret"}).status_code != 401
    assert httpx2.get(endless.url + "/health").json() == {"status": "ok"}


def test_unknown_fields_are_accepted(server) -> None:
    plain = server.post(CHAT, messages=MESSAGES).json()
    more = {"user": "me", "store": True, "reasoning_effort": "high", "never_heard": {"of": [1]}}
    message = MESSAGES[0] | {"cache_control": {"type": "ephemeral"}}
    response = server.post(CHAT, messages=[message], **more)
    assert response.status_code == 200
    assert response.json()["choices"] == plain["choices"]


def test_what_is_so_in_any_case_may_be_asked_for(server) -> None:
    usual = {"modalities": ["text"], "parallel_tool_calls": False}
    assert server.post(CHAT, messages=MESSAGES, max_tokens=2, **usual).status_code == 200
    usual = {"truncation": "disabled", "include": ["reasoning.encrypted_content"]}
    response = server.post("/v1/responses", input="a", max_output_tokens=2, **usual)
    assert response.status_code == 200
    assert response.json()["truncation"] == "disabled"


BAD = {
    "no messages": (CHAT, {}),
    "empty messages": (CHAT, {"messages": []}),
    "messages of text": (CHAT, {"messages": "hello-there"}),
    "a role": (CHAT, {"messages": [{"role": "wizard", "content": "hello-there"}]}),
    "a content": (CHAT, {"messages": [{"role": "user", "content": 7}]}),
    "a temperature": (CHAT, {"messages": MESSAGES, "temperature": -1}),
    "a temperature of text": (CHAT, {"messages": MESSAGES, "temperature": "hello-there"}),
    "top_p": (CHAT, {"messages": MESSAGES, "top_p": 2}),
    "no tokens": (CHAT, {"messages": MESSAGES, "max_tokens": 0}),
    "too many tokens": (CHAT, {"messages": MESSAGES, "max_tokens": 2001}),
    "a fraction of a token": (CHAT, {"messages": MESSAGES, "max_tokens": 1.5}),
    "n": (CHAT, {"messages": MESSAGES, "n": 1000}),
    "a seed": (CHAT, {"messages": MESSAGES, "seed": 2**70}),
    "an empty stop": (CHAT, {"messages": MESSAGES, "stop": [""]}),
    "a bias": (CHAT, {"messages": MESSAGES, "logit_bias": {"hello-there": 1}}),
    "a bias beyond": (CHAT, {"messages": MESSAGES, "logit_bias": {"99999999": 1}}),
    "top_logprobs alone": (CHAT, {"messages": MESSAGES, "top_logprobs": 3}),
    "a form": (CHAT, {"messages": MESSAGES, "response_format": {"type": "hello-there"}}),
    "no schema": (CHAT, {"messages": MESSAGES, "response_format": {"type": "json_schema"}}),
    "a schema": (
        CHAT,
        {
            "messages": MESSAGES,
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "a", "schema": {"type": "nothing"}},
            },
        },
    ),
    "a forced call": (CHAT, {"messages": MESSAGES, "tool_choice": "required"}),
    "a tool": (CHAT, {"messages": MESSAGES, "tools": [{"type": "hello-there"}]}),
    "functions": (CHAT, {"messages": MESSAGES, "functions": [{"name": "hello-there"}]}),
    "a function's call": (CHAT, {"messages": MESSAGES, "function_call": "auto"}),
    "sound": (CHAT, {"messages": MESSAGES, "audio": {"voice": "hello-there"}}),
    "answers in sound": (CHAT, {"messages": MESSAGES, "modalities": ["text", "audio"]}),
    "calls at once": (CHAT, {"messages": MESSAGES, "parallel_tool_calls": "hello-there"}),
    "a search of the web": (CHAT, {"messages": MESSAGES, "web_search_options": {}}),
    "a value of the template": (
        CHAT,
        {"messages": MESSAGES, "chat_template_kwargs": {"hello_there": 1}},
    ),
    "no prompt": (TEXT, {}),
    "no prompts": (TEXT, {"prompt": []}),
    "an unknown token": (TEXT, {"prompt": [10**7]}),
    "echo": (TEXT, {"prompt": "hello-there", "echo": True}),
    "half a character": (TEXT, {"prompt": "hello-there \ud800"}),
    "no input": ("/v1/responses", {}),
    "an item": ("/v1/responses", {"input": [{"type": "hello-there"}]}),
    "what was stored": ("/v1/responses", {"input": "a", "previous_response_id": "hello-there"}),
    "an inclusion": ("/v1/responses", {"input": "a", "include": ["hello-there"]}),
    "included scores": (
        "/v1/responses",
        {"input": "a", "include": ["message.output_text.logprobs"]},
    ),
    "scores": ("/v1/responses", {"input": "a", "top_logprobs": 3}),
    "a cut": ("/v1/responses", {"input": "a", "truncation": "auto"}),
    "a search": ("/v1/responses", {"input": "a", "tools": [{"type": "hello-there"}]}),
}


@pytest.mark.covering
@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("stream", [False, True])
def test_bad_input_is_refused_in_a_line(server, case: str, stream: bool) -> None:
    path, body = BAD[case]
    response = server.post(path, stream=stream, **body)
    error = response.json()["error"]
    assert response.status_code == 400, error
    assert error["type"] == "invalid_request_error"
    assert error["message"]
    assert "\n" not in error["message"]
    assert "hello-there" not in error["message"]  # what people write is not said again


@pytest.mark.parametrize(
    ("body", "kind", "status"),
    [
        (b"{", "application/json", 400),
        (b"", "application/json", 400),
        (b"[" * 100_000, "application/json", 400),
        (b"[]", "application/json", 400),
        (b"\xff\xfe", "application/json", 400),
        (b'{"prompt": "a"}', "text/plain", 400),
    ],
)
def test_what_is_no_json_is_refused(server, body: bytes, kind: str, status: int) -> None:
    response = httpx2.post(server.url + TEXT, content=body, headers={"Content-Type": kind})
    assert response.status_code == status
    assert "JSON" in response.json()["error"]["message"]


def test_paths_and_methods_that_are_not_there(server) -> None:
    missing = server.get("/v2/nothing")
    assert missing.status_code == 404
    assert missing.json()["error"]["type"] == "not_found_error"
    wrong = server.get(CHAT)
    assert wrong.status_code == 405
    assert wrong.headers["allow"] == "POST"
    assert wrong.json()["error"]["message"] == f"{CHAT} does not take GET"


@pytest.mark.parametrize("base", ["", "/v1/v1", "/v1/"])
def test_a_base_url_that_is_wrong_is_told(server, base: str) -> None:
    told = server.post(f"{base}/chat/completions", messages=MESSAGES).json()["error"]["message"]
    assert "the base URL must end in /v1" in told


@pytest.mark.slow
def test_an_idle_connection_outlasts_those_of_proxies(server) -> None:
    connection = http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=WAIT_S)
    connection.auto_open = 0  # it must not be opened again
    connection.connect()
    for idle_s in (6, 0):  # uvicorn closes after 5 seconds by default, nginx after 60
        connection.request("GET", "/health")
        response = connection.getresponse()
        assert response.read() == b'{"status":"ok"}'
        time.sleep(idle_s)
    connection.close()


def test_what_is_not_served_is_told_with_what_is(server) -> None:
    told = server.post("/v1/embeddings", input="a").json()["error"]["message"]
    assert "/v1/embeddings" in told
    assert "/v1/chat/completions, /v1/completions, /v1/responses" in told


@pytest.mark.parametrize("path", ["/health", "/"])
def test_watchers_may_ask_for_the_head_alone(server, path: str) -> None:
    head = httpx2.head(server.url + path)
    assert (head.status_code, head.content) == (200, b"")


def test_a_body_that_is_too_large_is_refused(server) -> None:
    told = server.post(TEXT, prompt="a " * 2**20)
    assert told.status_code == 413
    assert "2.00 MiB" in told.json()["error"]["message"]

    def pieces():
        for _ in range(64):
            yield b" " * 2**16

    untold = httpx2.post(
        server.url + TEXT, content=pieces(), headers={"Content-Type": "application/json"}
    )
    assert untold.status_code == 413
    assert server.get("/health").status_code == 200


def test_metrics_count_what_was_done(server) -> None:
    def read() -> dict[str, float]:
        text = server.get("/metrics").text
        names = [line.split()[2] for line in text.splitlines() if line.startswith("# TYPE")]
        assert names
        assert all(name.startswith("headinfer_") for name in names)
        lines = (line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
        return {name: float(value) for name, value in lines}

    before = read()
    answer = server.post(CHAT, messages=MESSAGES).json()
    server.post(CHAT, messages=[])
    after = read()

    def grown(name: str) -> float:
        return after.get(name, 0.0) - before.get(name, 0.0)

    assert after["headinfer_ready"] == 1
    assert grown('headinfer_requests_total{reason="stop"}') == 1
    assert grown('headinfer_tokens_total{kind="generated"}') == answer["usage"]["completion_tokens"]
    path = 'method="POST",path="/v1/chat/completions"'
    assert grown(f'headinfer_http_responses_total{{{path},status="200"}}') == 1
    assert grown(f'headinfer_http_responses_total{{{path},status="400"}}') == 1
    assert after["headinfer_process_resident_memory_bytes"] > 2**20
    assert 'headinfer_kv_bytes{place="cpu"}' in after


def test_what_can_never_fit_is_refused_before_anything_is_computed(endless) -> None:
    for stream in (False, True):
        response = endless.post(TEXT, prompt="w1", max_tokens=2**31 - 1, stream=stream)
        assert response.status_code == 400
        assert "2,147,483,6" in response.json()["error"]["message"]
    assert endless.slots() == [slot for slot in endless.slots() if slot["state"] != "running"]


def test_two_clients_get_the_answers_that_they_get_alone(server) -> None:
    questions = [MESSAGES, [{"role": "user", "content": QUESTION}]]
    alone = [server.post(CHAT, messages=each).json()["choices"] for each in questions]
    begun = [in_thread(lambda each=each: server.post(CHAT, messages=each)) for each in questions]
    assert [done.get(timeout=WAIT_S).json()["choices"] for done in begun] == alone
