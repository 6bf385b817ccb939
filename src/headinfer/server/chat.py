"""Answers of `/v1/chat/completions`."""

import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from sse_starlette import ServerSentEvent

from headinfer.server.listening import Asked
from headinfer.server.parsing import Called, MessageParser, Part, Thought
from headinfer.server.replies import (
    TICK_S,
    TokenBytes,
    Told,
    Total,
    finish_of,
    new_id,
    problem_at,
    progress_fields,
    sse,
    timings,
)
from headinfer.serving.events import Ended, Piece, TokenScore

Delta = tuple[dict[str, Any], dict[str, Any] | None]
"""What is new of a message, and the log probabilities of its tokens."""


class ChatChoice:
    """A choice of a chat's answer, as it grows.

    Args:
        parser: of its text.
        bytes_of: what a token writes; None to tell no log probabilities.
    """

    def __init__(self, parser: MessageParser, bytes_of: TokenBytes | None) -> None:
        self._parser = parser
        self._bytes_of = bytes_of
        self._scores: list[TokenScore] = []
        self._all_scores: list[TokenScore] = []
        self._texts: dict[str, list[str]] = {"content": [], "reasoning_content": []}
        self.calls: list[dict[str, Any]] = []

    def take(self, piece: Piece) -> list[Delta]:
        """Take a piece and return what is new of the message."""
        if self._bytes_of is not None:
            self._scores += piece.tokens
            self._all_scores += piece.tokens
        return self._deltas(self._parser.take(piece))

    def end(self) -> list[Delta]:
        """Return what was held back."""
        deltas = self._deltas(self._parser.end())
        if self._scores:  # of tokens that no text shows, such as the last one
            deltas.append(({}, self._taken_scores()))
        return deltas

    def message(self) -> dict[str, Any]:
        """Return the whole message."""
        content = "".join(self._texts["content"])
        message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
        if thought := "".join(self._texts["reasoning_content"]):
            message["reasoning_content"] = thought
        if self.calls:
            message["tool_calls"] = self.calls
            message["content"] = content or None
        return message

    def logprobs(self) -> dict[str, Any] | None:
        """Return the log probabilities of all tokens, if they were asked for."""
        return self._told(self._all_scores)

    def _deltas(self, parts: Sequence[Part]) -> list[Delta]:
        return [(self._delta(part), self._taken_scores()) for part in parts]

    def _delta(self, part: Part) -> dict[str, Any]:
        if isinstance(part, Called):
            function = {"name": part.name, "arguments": part.arguments}
            call = {"id": new_id("call_"), "type": "function", "function": function}
            self.calls.append(call)
            return {"tool_calls": [{"index": len(self.calls) - 1, **call}]}
        name = "reasoning_content" if isinstance(part, Thought) else "content"
        self._texts[name].append(part.text)
        return {name: part.text}

    def _taken_scores(self) -> dict[str, Any] | None:
        taken, self._scores = self._scores, []
        return self._told(taken)

    def _told(self, scores: Sequence[TokenScore]) -> dict[str, Any] | None:
        return logprobs_of(scores, self._bytes_of) if scores and self._bytes_of else None


def logprobs_of(scores: Sequence[TokenScore], bytes_of: TokenBytes) -> dict[str, Any]:
    """Return log probabilities as chats have them.

    Args:
        scores: of tokens.
        bytes_of: what a token writes.
    """

    def entry(token_id: int, text: str, logprob: float) -> dict[str, Any]:
        written = bytes_of(token_id, text)
        # JSON has no -inf; the least that OpenAI itself tells is this.
        told = {"token": written.decode(errors="replace"), "logprob": max(logprob, -9999.0)}
        return {**told, "bytes": list(written)}

    return {
        "content": [
            {
                **entry(score.token_id, score.text, score.logprob),
                "top_logprobs": [entry(*each) for each in score.top],
            }
            for score in scores
        ],
        "refusal": None,
    }


class ChatReply:
    """A reply to one request for a chat's next message.

    Args:
        name: of the model.
        make_parser: returns a parser for a choice.
        bytes_of: what a token writes; None to tell no log probabilities.
        progress: whether the stream tells of the prompt, and of the place in the queue.
        include_usage: whether the stream ends with what it took.
    """

    def __init__(
        self,
        name: str,
        make_parser: Callable[[], MessageParser],
        *,
        bytes_of: TokenBytes | None = None,
        progress: bool = False,
        include_usage: bool = False,
    ) -> None:
        self._name = name
        self._make_parser = make_parser
        self._bytes_of = bytes_of
        self._progress = progress
        self._include_usage = include_usage
        self._id = new_id("chatcmpl-")
        self._created = int(time.time())

    async def whole(self, asked: Asked) -> dict[str, Any]:
        """Return the answer once it is there.

        Raises:
            ProblemError: it does not come.
        """
        total, choices = Total(), list[dict[str, Any]]()
        slot_id: str | None = None
        choice = self._new_choice()
        async for number, event in asked.events():
            if isinstance(event, Piece):
                choice.take(event)
            elif isinstance(event, Ended):
                if (problem := problem_at(event)) is not None:
                    raise problem
                choice.end()
                total.add(0, event.usage)
                slot_id = event.slot_id
                choices.append(
                    {
                        "index": number,
                        "message": choice.message(),
                        "logprobs": choice.logprobs(),
                        "finish_reason": finish_of(event, called=bool(choice.calls)),
                    }
                )
                choice = self._new_choice()
        return {
            **self._head("chat.completion"),
            "choices": choices,
            "usage": total.as_dict(),
            "timings": total.timings(),
            "id_slot": slot_id,
        }

    async def stream(self, asked: Asked) -> AsyncIterator[ServerSentEvent]:
        """Yield the answer as it comes."""
        total, told = Total(), Told()
        choice, last = self._new_choice(), -1
        async for number, event in asked.events(TICK_S if self._progress else None):
            if number != last:
                choice, last, told = self._new_choice(), number, Told()
                yield self._chunk(number, {"role": "assistant", "content": ""})
            if isinstance(event, Piece):
                told.note(None)
                for delta, logprobs in choice.take(event):
                    yield self._chunk(number, delta, logprobs)
            elif isinstance(event, Ended):
                if (problem := problem_at(event)) is not None:
                    yield sse(problem.as_dict())
                    break
                for delta, logprobs in choice.end():
                    yield self._chunk(number, delta, logprobs)
                total.add(0, event.usage)
                finish = finish_of(event, called=bool(choice.calls))
                took = timings(event.usage)
                yield self._chunk(number, {}, finish=finish, timings=took, id_slot=event.slot_id)
            elif self._progress:
                for more in progress_fields(event, told):
                    yield self._chunk(number, {}, **more)
        else:
            if self._include_usage:
                head = self._head("chat.completion.chunk")
                yield sse({**head, "choices": [], "usage": total.as_dict()})
        yield sse("[DONE]")

    def _new_choice(self) -> ChatChoice:
        return ChatChoice(self._make_parser(), self._bytes_of)

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self._id, "object": kind, "created": self._created, "model": self._name}

    def _chunk(
        self,
        number: int,
        delta: dict[str, Any],
        logprobs: dict[str, Any] | None = None,
        finish: str | None = None,
        **more: Any,
    ) -> ServerSentEvent:
        choice = {"index": number, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
        return sse({**self._head("chat.completion.chunk"), "choices": [choice], **more})
