"""Answers of `/v1/completions`."""

import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from typing import Any

from sse_starlette import ServerSentEvent

from headinfer.server.listening import Asked
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


class CompletionReply:
    """A reply to one request to continue texts.

    Args:
        name: of the model.
        per_prompt: choices of each prompt.
        bytes_of: what a token writes.
        progress: whether the stream tells of the prompt, and of the place in the queue.
        include_usage: whether the stream ends with what it took.
    """

    def __init__(
        self,
        name: str,
        per_prompt: int,
        bytes_of: TokenBytes,
        *,
        progress: bool = False,
        include_usage: bool = False,
    ) -> None:
        self._name = name
        self._per_prompt = per_prompt
        self._bytes_of = bytes_of
        self._progress = progress
        self._include_usage = include_usage
        self._id = new_id("cmpl-")
        self._created = int(time.time())

    async def whole(self, asked: Asked) -> dict[str, Any]:
        """Return the answer once it is there.

        Raises:
            ProblemError: it does not come.
        """
        total, choices = Total(), list[dict[str, Any]]()
        slot_id: str | None = None
        texts: list[str] = []
        scores: list[TokenScore] = []
        async for number, event in asked.events():
            if isinstance(event, Piece):
                texts.append(event.text)
                scores += self._written(event.tokens)
            elif isinstance(event, Ended):
                if (problem := problem_at(event)) is not None:
                    raise problem
                total.add(number // self._per_prompt, event.usage)
                slot_id = event.slot_id
                choices.append(_choice(number, "".join(texts), scores, 0, finish_of(event)))
                texts, scores = [], []
        took = {"usage": total.as_dict(), "timings": total.timings(), "id_slot": slot_id}
        return {**self._head(), "choices": choices, **took}

    async def stream(self, asked: Asked) -> AsyncIterator[ServerSentEvent]:
        """Yield the answer as it comes."""
        total, told, last, offset = Total(), Told(), -1, 0
        async for number, event in asked.events(TICK_S if self._progress else None):
            if number != last:
                told, last, offset = Told(), number, 0
            if isinstance(event, Piece):
                told.note(None)
                if event.text or event.tokens:
                    scores = self._written(event.tokens)
                    yield self._chunk(_choice(number, event.text, scores, offset, None))
                offset += len(event.text)
            elif isinstance(event, Ended):
                if (problem := problem_at(event)) is not None:
                    yield sse(problem.as_dict())
                    break
                total.add(number // self._per_prompt, event.usage)
                ended = _choice(number, "", (), offset, finish_of(event))
                took = timings(event.usage)
                yield self._chunk(ended, timings=took, id_slot=event.slot_id)
            elif self._progress:
                for more in progress_fields(event, told):
                    yield self._chunk(_choice(number, "", (), offset, None), **more)
        else:
            if self._include_usage:
                yield sse({**self._head(), "choices": [], "usage": total.as_dict()})
        yield sse("[DONE]")

    def _written(self, scores: Sequence[TokenScore]) -> list[TokenScore]:
        """Return scores with what tokens write: some tokenizers leave out spaces of one alone."""

        def text(token_id: int, alone: str) -> str:
            return self._bytes_of(token_id, alone).decode(errors="replace")

        return [
            replace(
                score,
                text=text(score.token_id, score.text),
                top=tuple((each, text(each, alone), logprob) for each, alone, logprob in score.top),
            )
            for score in scores
        ]

    def _head(self) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": "text_completion",
            "created": self._created,
            "model": self._name,
        }

    def _chunk(self, choice: dict[str, Any], **more: Any) -> ServerSentEvent:
        return sse({**self._head(), "choices": [choice], **more})


def _choice(
    number: int, text: str, scores: Sequence[TokenScore], offset: int, finish: str | None
) -> dict[str, Any]:
    return {
        "index": number,
        "text": text,
        "logprobs": _logprobs(scores, offset) if scores else None,
        "finish_reason": finish,
    }


def _logprobs(scores: Sequence[TokenScore], offset: int) -> dict[str, Any]:
    """Return log probabilities as completions have them.

    Args:
        scores: of consecutive tokens.
        offset: characters of the text before them.
    """
    offsets = []
    for score in scores:
        offsets.append(offset)
        offset += len(score.text)
    return {
        "tokens": [score.text for score in scores],
        "token_logprobs": [max(score.logprob, -9999.0) for score in scores],
        "top_logprobs": [
            {text: max(logprob, -9999.0) for _, text, logprob in score.top} for score in scores
        ],
        "text_offset": offsets,
    }
