"""Calls of tools that a model must make, as a grammar of its own form of calls."""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from headinfer.server.guide import SPACES
from headinfer.server.problems import ProblemError

_REFUSED = "tool_choice may be auto or none with this model: the form of its calls is not known"
_TAIL_TOKENS = 256


def wanted_tools(
    tools: Sequence[Mapping[str, Any]] | None, choice: Any
) -> list[Mapping[str, Any]] | None:
    """Return the tools of which one must be called, or None where the model may choose.

    Args:
        tools: that the model may call.
        choice: `tool_choice` of a request.

    Raises:
        ProblemError: it is no choice, or names no tool.
    """
    if choice in (None, "auto", "none"):
        return None
    if choice == "required":
        wanted = list(tools or ())
    else:
        name = _name_of(choice)
        wanted = [tool for tool in tools or () if tool["function"]["name"] == name]
    if not wanted:
        raise ProblemError(400, "tool_choice names no tool of this request", param="tool_choice")
    return wanted


def _name_of(choice: Any) -> str:
    function = choice.get("function", choice) if isinstance(choice, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(name, str) or choice.get("type") != "function":
        raise ProblemError(
            400,
            "tool_choice may be auto, none, required, or a function by its name",
            param="tool_choice",
        )
    return name


def call_grammar(
    model: Any, tokenizer: Any, ids: Sequence[int], tools: Sequence[Mapping[str, Any]]
) -> str:
    """Return a grammar of one call, for llguidance.

    Args:
        model: of transformers.
        tokenizer: its.
        ids: the prompt, which may begin a thought. That ends at once.
        tools: of which one is called.

    Raises:
        ProblemError: this model's calls have another form than JSON between two marks.
    """
    fields = _fields(model, tokenizer)
    opened, closed = _marks(fields.get("tool_calls", {}))
    added = {token.content for token in getattr(tokenizer, "added_tokens_decoder", {}).values()}

    def written(mark: str) -> str:
        if mark not in added:
            return json.dumps(mark)
        if re.fullmatch(r"<[^<>\s]+>", mark) is None:  # llguidance has no others by their names
            raise ProblemError(400, _REFUSED, param="tool_choice")
        return mark

    parts = [written(opened), r'"\n" call "\n"', written(closed)]
    if _in_thought(fields, tokenizer, ids):
        end = str(fields["reasoning_content"]["close"])
        parts = [r'"\n"', written(end), r'"\n\n"', *parts]
    names = " | ".join(f"call_{number}" for number in range(len(tools)))
    rules = [f"start: {' '.join(parts)}", f"call: {names}"]
    for number, tool in enumerate(tools):
        rules += _call(number, tool["function"])
    return "\n".join(rules) + "\n"


def _call(number: int, function: Mapping[str, Any]) -> list[str]:
    """Return the rules of a call; the schema of its arguments is the root of its references."""
    before = f'{{"name": {json.dumps(function["name"])}, "arguments": '
    schema = {
        **(function.get("parameters") or {"type": "object"}),
        "x-guidance": {"whitespace_pattern": SPACES},
    }
    return [
        f'call_{number}: {json.dumps(before)} arguments_{number} "}}"',
        f"arguments_{number}: %json {json.dumps(schema)}",
    ]


def _fields(model: Any, tokenizer: Any) -> Mapping[str, Any]:
    """Return the parts of a model's messages, as transformers' parser knows them."""
    try:
        from transformers.cli.serving.utils import get_response_template
    except ImportError:
        return {}
    template = get_response_template(tokenizer, model) or {}
    fields: Mapping[str, Any] = template.get("fields", {})
    return fields


def _marks(field: Mapping[str, Any]) -> tuple[str, str]:
    """Return what stands before and behind a call in JSON."""
    pattern = str(field.get("open_pattern", "")).removeprefix(r"\s*")
    opened = field.get("open") or re.sub(r"\\(\W)", r"\1", pattern)
    closed = field.get("close")
    transform = field.get("transform") or {}
    is_json = field.get("content") == "json" and "content_args" not in field
    literal = isinstance(opened, str) and re.fullmatch(r"[\w<>|/\[\]-]+", opened)
    if not (is_json and literal and isinstance(closed, str)):
        raise ProblemError(400, _REFUSED, param="tool_choice")
    if transform.get("function") != "{content}":
        raise ProblemError(400, _REFUSED, param="tool_choice")
    return str(opened), closed


def _in_thought(fields: Mapping[str, Any], tokenizer: Any, ids: Sequence[int]) -> bool:
    """Whether a prompt ends within a thought of the answer."""
    thought = fields.get("reasoning_content", {})
    opened, closed = thought.get("open"), thought.get("close")
    if not isinstance(opened, str) or not isinstance(closed, str):
        return False
    tail = str(tokenizer.decode(list(ids[-_TAIL_TOKENS:]), skip_special_tokens=False))
    return tail.rstrip().endswith(opened.rstrip())
