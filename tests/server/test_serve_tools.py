"""Calls of tools: an agent's client that makes use of them, and calls that are forced."""

import json
from types import SimpleNamespace
from typing import Any

import httpx2
import pytest
import torch
from llguidance import LLMatcher, LLTokenizer
from openai import OpenAI
from scripted import ScriptedDesk, serving

from headinfer.demo.tokenizer import build_tokenizer
from headinfer.server.calls import call_grammar, wanted_tools
from headinfer.server.guide import Guide
from headinfer.server.parsing import Called, Said, parser_of
from headinfer.server.problems import ProblemError
from headinfer.serving.events import Piece

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "look",
            "parameters": {
                "type": "object",
                "properties": {
                    "place": {"enum": ["attic", "cellar"]},
                    "hours": {"type": "integer"},
                },
                "required": ["place", "hours"],
                "additionalProperties": False,
            },
        },
    },
    {"type": "function", "function": {"name": "wait"}},
]
QWEN = SimpleNamespace(config=SimpleNamespace(model_type="qwen3"))


def call_of(name: str, **arguments: Any) -> str:
    call = json.dumps({"name": name, "arguments": arguments})
    return f"<tool_call>\n{call}\n</tool_call>"


def test_an_agent_solves_a_task_with_a_tool() -> None:
    smolagents = pytest.importorskip("smolagents")

    @smolagents.tool
    def add(first: int, second: int) -> int:
        """Add two numbers.

        Args:
            first: a number.
            second: another one.
        """
        calls.append((first, second))
        return first + second

    calls: list[tuple[int, int]] = []
    desk = ScriptedDesk(
        [call_of("add", first=19, second=23)], [call_of("final_answer", answer="42")]
    )
    with serving(desk, tokenizer=build_tokenizer()) as (url, _):
        model = smolagents.OpenAIServerModel("scripted", api_base=f"{url}/v1", api_key="none")
        agent = smolagents.ToolCallingAgent(tools=[add], model=model, verbosity_level=0)
        assert agent.run("What are 19 and 23?") == "42"
    assert calls == [(19, 23)]
    assert len(desk.asks) == 2
    assert all(ask.processors is not None for ask in desk.asks)  # it has calls forced


@pytest.mark.parametrize("parallel", [True, False])
def test_an_answer_has_one_call_where_a_client_takes_no_more(parallel: bool) -> None:
    calls = [call_of("look", place="attic", hours=hours) for hours in (1, 2)]
    responses = [{"type": "function", **tool["function"]} for tool in TOOLS]
    with serving(ScriptedDesk(["I ", "look.", *calls])) as (url, _):
        client = OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        asked: Any = {"model": "scripted", "parallel_tool_calls": parallel}
        chat: Any = asked | {"messages": [{"role": "user", "content": "w1"}], "tools": TOOLS}
        whole = client.chat.completions.create(**chat)
        with client.chat.completions.stream(**chat) as stream:
            streamed = stream.until_done().get_final_completion()
        response = client.responses.create(input="w1", tools=responses, **asked)
    wanted = [1, 2] if parallel else [1]
    for answer in (whole, streamed):
        (choice,) = answer.choices
        assert choice.finish_reason == "tool_calls"
        assert choice.message.content.strip() == "I look."
        told = [json.loads(call.function.arguments) for call in choice.message.tool_calls]
        assert [arguments["hours"] for arguments in told] == wanted
    items = [item for item in response.output if item.type == "function_call"]
    assert [json.loads(item.arguments)["hours"] for item in items] == wanted
    assert response.parallel_tool_calls is parallel


@pytest.mark.covering
@pytest.mark.parametrize("form", ["plain", "added", "special"])
@pytest.mark.parametrize("prompt", ["What?", "What?<think>\n"])
@pytest.mark.parametrize("choice", ["required", "look"])
def test_a_forced_call_is_one_whatever_the_model_thinks(
    choice: str, prompt: str, form: str
) -> None:
    tokenizer = build_tokenizer()
    marks = ["<tool_call>", "</tool_call>", "<think>", "</think>"]
    if form == "special":
        tokenizer.add_special_tokens({"additional_special_tokens": marks})
    elif form == "added":
        tokenizer.add_tokens(marks)
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    named = {"type": "function", "function": {"name": "look"}}
    wanted = wanted_tools(TOOLS, "required" if choice == "required" else named)
    assert wanted is not None
    vocabulary, end_id = len(tokenizer), tokenizer.eos_token_id
    guide = Guide(tokenizer, vocabulary, frozenset({end_id}))
    (guided,) = guide.following(call_grammar(QWEN, tokenizer, ids, wanted))()
    torch.manual_seed(0)
    row = list(ids)
    while row[-1] != end_id and len(row) < 400:
        scores = guided(torch.tensor([row]), torch.randn(1, vocabulary))
        row.append(int(scores.argmax()))
    assert row[-1] == end_id
    text = tokenizer.decode(row[len(ids) : -1], skip_special_tokens=False)
    parser = parser_of(QWEN, tokenizer, ids, TOOLS)
    parts = [*parser.take(Piece(text, ())), *parser.end()]
    (call,) = (part for part in parts if isinstance(part, Called))
    assert not any(part.text.strip() for part in parts if isinstance(part, Said))
    arguments = json.loads(call.arguments)
    if choice == "look" or call.name == "look":
        assert call.name == "look"
        assert arguments["place"] in ("attic", "cellar")
        assert isinstance(arguments["hours"], int)
    else:
        assert call.name == "wait"


def test_arguments_that_are_forced_follow_their_schema() -> None:
    """References are to the schema of the arguments, and spaces between them have an end."""
    tree = {
        "type": "object",
        "properties": {"leaf": {"$ref": "#/$defs/leaf"}, "left": {"$ref": "#"}},
        "required": ["leaf"],
        "additionalProperties": False,
        "$defs": {"leaf": {"enum": ["oak"]}},
    }
    tool = {"type": "function", "function": {"name": "grow", "parameters": tree}}
    tokenizer = build_tokenizer()
    matcher = LLTokenizer("byte")

    def taken(arguments: str) -> bool:
        call = f'<tool_call>\n{{"name": "grow", "arguments": {arguments}}}\n</tool_call>'.encode()
        grammar = call_grammar(QWEN, tokenizer, [], [tool])
        return LLMatcher(matcher, grammar).try_consume_tokens(list(call)) == len(call)

    assert taken('{"leaf": "oak", "left": {"leaf": "oak"}}')
    assert not taken('{"leaf": "elm"}')
    assert not taken('{"leaf": "oak", "left": {"name": "grow"}}')
    assert not taken("{" + 20 * " " + '"leaf": "oak"}')


@pytest.mark.parametrize("kind", ["llama", "qwen3_5", "gemma4"])
def test_a_call_in_another_form_is_not_forced(kind: str) -> None:
    model = SimpleNamespace(config=SimpleNamespace(model_type=kind))
    with pytest.raises(ProblemError, match="tool_choice may be auto or none"):
        call_grammar(model, build_tokenizer(), [], TOOLS)


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ({"tool_choice": "required", "tools": []}, "names no tool"),
        ({"tool_choice": "always"}, "auto, none, required"),
        ({"tool_choice": {"type": "function", "function": {"name": "run"}}}, "names no tool"),
        ({"tool_choice": {"type": "allowed_tools"}}, "auto, none, required"),
        (
            {"tool_choice": "required", "response_format": {"type": "json_object"}},
            "a call is forced",
        ),
    ],
)
def test_what_cannot_be_forced_is_refused(more: dict, told: str) -> None:
    body = {"messages": [{"role": "user", "content": "w1"}], "tools": TOOLS, **more}
    with serving(ScriptedDesk(["w3"])) as (url, _):
        refused = httpx2.post(f"{url}/v1/chat/completions", json=body)
    assert refused.status_code == 400
    assert told in refused.json()["error"]["message"]
