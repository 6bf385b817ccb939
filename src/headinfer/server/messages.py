"""Messages and tools of OpenAI's interfaces, in the form that chat templates take."""

import copy
import json
from collections.abc import Sequence
from typing import Any

from headinfer.server.bodies import Message
from headinfer.server.problems import ProblemError

_ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
    "function": "tool",
}
"""Roles of requests, and what chat templates call them."""

_ALONE = ("tool_calls", "reasoning_content", "refusal")
"""What an assistant's message may have in place of content."""

_NULLABLE = "function"
"""The role whose content OpenAI lets be null."""

_TEXTS = ("text", "input_text", "output_text", "refusal", "reasoning_text", "summary_text")


def chat_messages(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Return the messages of a conversation as chat templates take them.

    Raises:
        ProblemError: one has a role or a content that is not served.
    """
    return [_chat_message(message, f"messages.{idx}") for idx, message in enumerate(messages)]


def _chat_message(message: Message, place: str) -> dict[str, Any]:
    role, given = _role(message.role, place), message.model_dump()
    stands_alone = role == "assistant" and any(given.get(name) for name in _ALONE)
    if given["content"] is None and (stands_alone or message.role == _NULLABLE):
        said = ""
    else:
        said = _said(given["content"], message.role, place)
    taken: dict[str, Any] = {"role": role, "content": said}
    if message.reasoning_content is not None:
        taken["reasoning_content"] = message.reasoning_content
    if message.tool_calls:
        taken["tool_calls"] = [
            _parsed_call(call, f"{place}.tool_calls.{idx}")
            for idx, call in enumerate(message.tool_calls)
        ]
    for name in ("tool_call_id", "name"):
        if (value := getattr(message, name)) is not None:
            taken[name] = value
    return taken


def _problem(place: str, told: str) -> ProblemError:
    """Return what is wrong at a place, such as `messages.3.content`."""
    return ProblemError(400, f"{place}{told}", param=place.split(".")[0])


def _role(given: object, place: str) -> str:
    if not isinstance(given, str) or given not in _ROLES:
        raise _problem(place, f".role must be one of {', '.join(_ROLES)}")
    return _ROLES[given]


def _said(content: Any, role: str, place: str) -> str:
    """Return the text of a message, whose content may be parts."""
    if isinstance(content, str):
        return content
    place = f"{place}.content"
    assists = role == "assistant"
    needs = f"a {role} message needs text"
    if assists:
        needs = "an assistant message needs text or tool_calls"
    if content is None:
        raise _problem(place, f" is missing or null; {needs}")
    if not isinstance(content, list):
        raise _problem(place, " must be text or a list of parts")
    if not content and not assists:
        raise _problem(place, f" has no parts; {needs}")
    return _text(content, place)


def _text(parts: Sequence[Any], place: str) -> str:
    """Return the text of a content's parts."""
    texts: list[str] = []
    for idx, part in enumerate(parts):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind not in _TEXTS:
            raise _problem(f"{place}.{idx}", ": only text is served, no images, sound or files")
        name = "refusal" if kind == "refusal" and part.get("text") is None else "text"
        text = part.get(name)
        if text is None:
            raise _problem(f"{place}.{idx}.{name}", " is missing or null")
        if not isinstance(text, str):
            raise _problem(f"{place}.{idx}.{name}", " must be text")
        texts.append(text)
    return "\n".join(texts)


def _parsed_call(call: Any, place: str) -> dict[str, Any]:
    """Return a call of a tool, whose arguments chat templates want as a mapping."""
    call = copy.deepcopy(call)
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise _problem(place, " needs a function with a name and arguments")
    function["arguments"] = _arguments(function.get("arguments"))
    return dict(call)


def _arguments(given: Any) -> Any:
    if not isinstance(given, str):
        return given or {}
    try:
        return json.loads(given or "{}")
    except ValueError:
        return given  # as a model once wrote it


def chat_tools(tools: Any, choice: Any) -> list[dict[str, Any]] | None:
    """Return the tools that a model may call, or None.

    Raises:
        ProblemError: they are none.
    """
    for tool in tools or ():
        function = tool.get("function") if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise ProblemError(
                400, "a tool must be a function with a name; others are not served", param="tools"
            )
    return list(tools) if tools and choice != "none" else None


def response_tools(tools: Any, choice: Any) -> list[dict[str, Any]] | None:
    """Return the tools of a request for a response, or None.

    Raises:
        ProblemError: they are none.
    """
    nested = []
    for tool in tools or ():
        if tool.get("type") != "function":
            raise ProblemError(400, "only tools of type function are served", param="tools")
        function = {name: value for name, value in tool.items() if name not in ("type", "strict")}
        nested.append({"type": "function", "function": function})
    return chat_tools(nested, choice)


def response_messages(
    given: str | list[dict[str, Any]], instructions: str | None
) -> list[dict[str, Any]]:
    """Return the items of a response's input as chat templates take them.

    Raises:
        ProblemError: an item is of a kind that is not served.
    """
    taken: list[dict[str, Any]] = []
    if instructions:
        taken.append({"role": "system", "content": instructions})
    if isinstance(given, str):
        return [*taken, {"role": "user", "content": given}]
    if not given:
        raise ProblemError(400, "input has no items", param="input")
    thought = ""
    for idx, item in enumerate(given):
        kind, place = item.get("type", "message"), f"input.{idx}"
        if kind == "reasoning":
            name = "content" if item.get("content") else "summary"
            thought += _text(item.get(name) or [], f"{place}.{name}")
            continue
        message = _item(kind, item, place)
        if message["role"] == "assistant" and thought:
            message, thought = message | {"reasoning_content": thought}, ""
        calls = message.get("tool_calls")
        if calls and taken and taken[-1].get("role") == "assistant":  # one message, several items
            taken[-1].setdefault("tool_calls", []).extend(calls)
        else:
            taken.append(message)
    return taken


def _item(kind: Any, item: dict[str, Any], place: str) -> dict[str, Any]:
    if kind == "message":
        role = _role(item.get("role"), place)
        return {"role": role, "content": _said(item.get("content"), item["role"], place)}
    if kind == "function_call":
        if not isinstance(item.get("name"), str):
            raise _problem(place, ".name is missing or no text")
        function = {"name": item["name"], "arguments": item.get("arguments")}
        called = {"type": "function", "id": item.get("call_id"), "function": function}
        return {"role": "assistant", "content": "", "tool_calls": [_parsed_call(called, place)]}
    if kind == "function_call_output":
        output = item.get("output")
        text = _text(output, f"{place}.output") if isinstance(output, list) else output
        if not isinstance(text, str):
            raise _problem(place, ".output is missing or no text")
        return {"role": "tool", "content": text, "tool_call_id": item.get("call_id")}
    kinds = "message, reasoning, function_call or function_call_output"
    raise _problem(place, f".type must be {kinds}")
