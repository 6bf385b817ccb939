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

_TEXTS = ("text", "input_text", "output_text", "refusal", "reasoning_text", "summary_text")


def chat_messages(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Return the messages of a conversation as chat templates take them.

    Raises:
        ProblemError: one has a role or a content that is not served.
    """
    return [_chat_message(message) for message in messages]


def _chat_message(message: Message) -> dict[str, Any]:
    content = message.content
    if isinstance(content, list):
        content = _text([part.model_dump() for part in content])
    taken: dict[str, Any] = {"role": _role(message.role), "content": content or ""}
    if message.reasoning_content is not None:
        taken["reasoning_content"] = message.reasoning_content
    if message.tool_calls:
        taken["tool_calls"] = [_parsed_call(call) for call in message.tool_calls]
    for name in ("tool_call_id", "name"):
        if (value := getattr(message, name)) is not None:
            taken[name] = value
    return taken


def _role(given: object) -> str:
    if not isinstance(given, str) or given not in _ROLES:
        raise ProblemError(
            400, f"a message's role must be one of {', '.join(_ROLES)}", param="messages"
        )
    return _ROLES[given]


def _text(parts: Sequence[Any]) -> str:
    """Return the text of a content's parts."""
    texts: list[str] = []
    for part in parts:
        kind = part.get("type") if isinstance(part, dict) else None
        text = part.get("text") or part.get("refusal") or "" if isinstance(part, dict) else None
        if kind not in _TEXTS or not isinstance(text, str):
            raise ProblemError(
                400, "only text is served in messages, no images, sound or files", param="messages"
            )
        texts.append(text)
    return "\n".join(texts)


def _parsed_call(call: Any) -> dict[str, Any]:
    """Return a call of a tool, whose arguments chat templates want as a mapping."""
    call = copy.deepcopy(call)
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise ProblemError(
            400, "a tool call needs a function with a name and arguments", param="messages"
        )
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
    for item in given:
        kind = item.get("type", "message")
        if kind == "reasoning":
            thought += _text(item.get("content") or item.get("summary") or [])
            continue
        message = _item(kind, item)
        if message["role"] == "assistant" and thought:
            message, thought = message | {"reasoning_content": thought}, ""
        calls = message.get("tool_calls")
        if calls and taken and taken[-1].get("role") == "assistant":  # one message, several items
            taken[-1].setdefault("tool_calls", []).extend(calls)
        else:
            taken.append(message)
    return taken


def _item(kind: Any, item: dict[str, Any]) -> dict[str, Any]:
    if kind == "message":
        content = item.get("content")
        if content is not None and not isinstance(content, (str, list)):
            raise ProblemError(400, "a message's content must be text or parts", param="input")
        said = _text(content) if isinstance(content, list) else content or ""
        return {"role": _role(item.get("role")), "content": said}
    if kind == "function_call":
        function = {"name": item.get("name"), "arguments": item.get("arguments")}
        call = _parsed_call({"type": "function", "id": item.get("call_id"), "function": function})
        return {"role": "assistant", "content": "", "tool_calls": [call]}
    if kind == "function_call_output":
        output = item.get("output")
        text: Any = _text(output) if isinstance(output, list) else output
        if not isinstance(text, str):
            raise ProblemError(400, "a function_call_output needs an output", param="input")
        return {"role": "tool", "content": text, "tool_call_id": item.get("call_id")}
    raise ProblemError(
        400, "items of input may be messages, function calls and their outputs", param="input"
    )
