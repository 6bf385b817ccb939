"""Answers of `/v1/responses`: items that grow, and an event for each thing that happens to one."""

import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

from sse_starlette import ServerSentEvent

from headinfer.server.bodies import ResponseBody
from headinfer.server.listening import Asked
from headinfer.server.parsing import Called, MessageParser, Part, Thought
from headinfer.server.problems import ProblemError
from headinfer.server.replies import finish_of, new_id, problem_at, sse
from headinfer.serving.events import Ended, Piece, Usage

_Event = tuple[str, dict[str, Any]]
"""A name and its fields."""


class Items:
    """A list of the items of a response, the last of which may still grow."""

    def __init__(self) -> None:
        self.done: list[dict[str, Any]] = []
        self._open: dict[str, Any] | None = None
        self._texts: list[str] = []

    def take(self, part: Part) -> Iterator[_Event]:
        """Add a part and yield the events that tell of it."""
        if isinstance(part, Called):
            yield from self.close()
            yield from self._call(part)
            return
        kind = "reasoning" if isinstance(part, Thought) else "message"
        if self._open is None or self._open["type"] != kind:
            yield from self.close()
            yield from self._begin(kind)
        self._texts.append(part.text)
        more: dict[str, Any] = {} if kind == "reasoning" else {"logprobs": []}
        yield f"response.{_NAMES[kind]}.delta", {**self._place(), "delta": part.text, **more}

    def close(self, status: str = "completed") -> Iterator[_Event]:
        """End the item that grows, if any, and yield the events that tell of it.

        Args:
            status: of the item.
        """
        item = self._open
        if item is None:
            return
        text = "".join(self._texts)
        kind = item["type"]
        more: dict[str, Any] = {} if kind == "reasoning" else {"logprobs": []}
        part = _content(kind, text)
        yield f"response.{_NAMES[kind]}.done", {**self._place(), "text": text, **more}
        yield "response.content_part.done", {**self._place(), "part": part}
        finished = {**item, "status": status, "content": [part]}
        yield "response.output_item.done", {"output_index": len(self.done), "item": finished}
        self.done.append(finished)
        self._open = None

    def _begin(self, kind: str) -> Iterator[_Event]:
        own: dict[str, Any] = {"summary": []} if kind == "reasoning" else {"role": "assistant"}
        name = new_id("rs_" if kind == "reasoning" else "msg_")
        self._open = {"id": name, "type": kind, "status": "in_progress", "content": [], **own}
        self._texts = []
        added = {"output_index": len(self.done), "item": self._open}
        yield "response.output_item.added", added
        yield "response.content_part.added", {**self._place(), "part": _content(kind, "")}

    def _call(self, part: Called) -> Iterator[_Event]:
        item = {
            "id": new_id("fc_"),
            "type": "function_call",
            "status": "in_progress",
            "call_id": new_id("call_"),
            "name": part.name,
            "arguments": "",
        }
        index = len(self.done)
        place = {"item_id": item["id"], "output_index": index}
        yield "response.output_item.added", {"output_index": index, "item": item}
        name = "response.function_call_arguments"
        yield f"{name}.delta", {**place, "delta": part.arguments}
        yield f"{name}.done", {**place, "name": part.name, "arguments": part.arguments}
        finished = {**item, "status": "completed", "arguments": part.arguments}
        yield "response.output_item.done", {"output_index": index, "item": finished}
        self.done.append(finished)

    def _place(self) -> dict[str, Any]:
        assert self._open is not None
        return {
            "item_id": self._open["id"],
            "output_index": len(self.done),
            "content_index": 0,
        }


_NAMES = {"message": "output_text", "reasoning": "reasoning_text"}
"""What the events of an item's text are called, by its type."""


def _content(kind: str, text: str) -> dict[str, Any]:
    if kind == "reasoning":
        return {"type": "reasoning_text", "text": text}
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


class ResponseReply:
    """A reply to one request for a response.

    Args:
        name: of the model.
        body: the request, much of which is said again.
        parser: of the answer's text.
    """

    def __init__(self, name: str, body: ResponseBody, parser: MessageParser) -> None:
        self._parser = parser
        self._items = Items()
        self._told = 0
        text = body.text.model_dump(by_alias=True, exclude_none=True) if body.text else None
        self._response: dict[str, Any] = {
            "id": new_id("resp_"),
            "object": "response",
            "created_at": int(time.time()),
            "status": "in_progress",
            "background": False,
            "error": None,
            "incomplete_details": None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata or {},
            "model": name,
            "output": [],
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": None,
            "store": False,
            "temperature": body.temperature,
            "text": text or {"format": {"type": "text"}},
            "tool_choice": body.tool_choice or "auto",
            "tools": body.tools or [],
            "top_p": body.top_p,
            "truncation": "disabled",
            "usage": None,
        }

    async def whole(self, asked: Asked) -> dict[str, Any]:
        """Return the response once it is there.

        Raises:
            ProblemError: it does not come.
        """
        async for _, event in asked.events():
            if isinstance(event, Ended) and (problem := problem_at(event)) is not None:
                raise problem
            for _ in self._happened(event):
                pass
        return self._response

    async def stream(self, asked: Asked) -> AsyncIterator[ServerSentEvent]:
        """Yield what happens."""
        yield self._event("response.created", {"response": self._response})
        yield self._event("response.in_progress", {"response": self._response})
        async for _, event in asked.events():
            if isinstance(event, Ended) and (problem := problem_at(event)) is not None:
                yield self._failed(problem)
                return
            for name, fields in self._happened(event):
                yield self._event(name, fields)

    def _happened(self, event: object) -> Iterator[_Event]:
        """Take an event of the desk and yield those of the response."""
        if isinstance(event, Piece):
            for part in self._parser.take(event):
                yield from self._items.take(part)
        elif isinstance(event, Ended):
            for part in self._parser.end():
                yield from self._items.take(part)
            whole = finish_of(event) == "stop"
            status = "completed" if whole else "incomplete"
            yield from self._items.close(status)
            self._response |= {
                "status": status,
                "incomplete_details": None if whole else {"reason": "max_output_tokens"},
                "output": self._items.done,
                "usage": _usage(event.usage),
            }
            yield f"response.{status}", {"response": self._response}

    def _failed(self, problem: ProblemError) -> ServerSentEvent:
        told = {"code": "server_error", "message": problem.message}
        self._response |= {"status": "failed", "error": told, "output": self._items.done}
        return self._event("response.failed", {"response": self._response})

    def _event(self, name: str, fields: dict[str, Any]) -> ServerSentEvent:
        told, self._told = self._told, self._told + 1
        return sse({"type": name, "sequence_number": told, **fields}, name)


def _usage(usage: Usage) -> dict[str, Any]:
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }
