"""What answers of all of OpenAI's interfaces have in common."""

import json
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from sse_starlette import ServerSentEvent

from headinfer.server.problems import ProblemError, problem_of
from headinfer.serving.events import Ended, Event, Progress, Queued, Usage

TICK_S = 0.8
"""Seconds after which progress is told again, though no chunk was read; a busy CPU adds some."""

TokenBytes = Callable[[int, str], bytes]
"""Returns the bytes that a token writes, given its id and its text alone."""


@dataclass(slots=True)
class Total:
    """A sum of what the choices of one request took: the prompt once, all new tokens."""

    prompts: dict[int, Usage] = field(default_factory=dict)
    completion_tokens: int = 0
    decode_s: float = 0.0
    drafted_tokens: int = 0
    accepted_tokens: int = 0

    def add(self, prompt: int, usage: Usage) -> None:
        """Add a choice.

        Args:
            prompt: its number among the request's; a prompt counts once.
            usage: of the choice.
        """
        self.prompts.setdefault(prompt, usage)
        self.completion_tokens += usage.completion_tokens
        self.decode_s += usage.decode_s
        self.drafted_tokens += usage.drafted_tokens
        self.accepted_tokens += usage.accepted_tokens

    def as_dict(self) -> dict[str, Any]:
        """Return it as the interfaces of completions have it."""
        prompt_tokens = sum(usage.prompt_tokens for usage in self.prompts.values())
        cached_tokens = sum(usage.cached_tokens for usage in self.prompts.values())
        return {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": cached_tokens},
        }

    def timings(self) -> dict[str, Any]:
        """Return what all of it took, with llama-server's names."""
        prompts = self.prompts.values()
        return timings(
            Usage(
                prompt_tokens=sum(usage.prompt_tokens for usage in prompts),
                cached_tokens=sum(usage.cached_tokens for usage in prompts),
                completion_tokens=self.completion_tokens,
                prefill_s=sum(usage.prefill_s for usage in prompts),
                decode_s=self.decode_s,
                drafted_tokens=self.drafted_tokens,
                accepted_tokens=self.accepted_tokens,
            )
        )


class Told:
    """A note of the progress of one prompt, to be told again while a chunk takes its time."""

    def __init__(self) -> None:
        self._last: Progress | None = None
        self._at = 0.0

    def note(self, progress: Progress | None) -> None:
        """Take the newest progress; None once the prompt is read."""
        self._last, self._at = progress, time.monotonic()

    def as_dict(self) -> dict[str, Any] | None:
        """Return it as llama-server's `prompt_progress`, if the prompt is being read."""
        last = self._last
        if last is None or last.processed >= last.total > 0:
            return None
        return progress_dict(last, 1000 * (time.monotonic() - self._at))


def progress_dict(progress: Progress, later_ms: float = 0.0) -> dict[str, Any]:
    """Return progress as llama-server's `prompt_progress`.

    Args:
        progress: of a prompt.
        later_ms: milliseconds since then.
    """
    return {
        "total": progress.total,
        "cache": progress.cached,
        "processed": progress.processed,
        "time_ms": round(progress.time_ms + later_ms),
    }


def progress_fields(event: Event | None, told: Told) -> list[dict[str, Any]]:
    """Return what a stream tells of a prompt that is waiting or being read.

    Args:
        event: of the desk; None where there was none for a while.
        told: takes note of it.
    """
    if isinstance(event, Queued):
        return [{"queue_position": event.position}]
    if isinstance(event, Progress):
        told.note(event)
        return [{"prompt_progress": progress_dict(event)}]
    again = told.as_dict()
    return [] if again is None else [{"prompt_progress": again}]


def new_id(kind: str) -> str:
    """Return a name for an answer.

    Args:
        kind: what it begins with.
    """
    return f"{kind}{secrets.token_hex(12)}"


def problem_at(ended: Ended) -> ProblemError | None:
    """Return what went wrong with an answer, or None."""
    if ended.finish_reason == "error":
        if ended.error is None:
            return ProblemError(500, "the request failed; the server goes on")
        return problem_of(ended.error)
    if ended.finish_reason == "cancelled":
        return ProblemError(503, "the server is stopping; ask again later", code="closing")
    if ended.finish_reason == "time" and not ended.usage.completion_tokens:
        return ProblemError(
            504, "the time for a request was over before the first token", code="timeout"
        )
    return None


def finish_of(ended: Ended, *, called: bool = False) -> str:
    """Return OpenAI's word for why an answer ended.

    Args:
        ended: without a problem.
        called: whether it calls tools.
    """
    if called:
        return "tool_calls"
    return "stop" if ended.finish_reason == "stop" else "length"


def timings(usage: Usage) -> dict[str, Any]:
    """Return what a choice took, with llama-server's names."""
    drafts = {"draft_n": usage.drafted_tokens, "draft_n_accepted": usage.accepted_tokens}
    return {
        "cache_n": usage.cached_tokens,
        "prompt_n": usage.prompt_tokens - usage.cached_tokens,
        "prompt_ms": round(1000 * usage.prefill_s, 1),
        "predicted_n": usage.completion_tokens,
        "predicted_ms": round(1000 * usage.decode_s, 1),
        **(drafts if usage.drafted_tokens else {}),
    }


def sse(data: dict[str, Any] | str, event: str | None = None) -> ServerSentEvent:
    """Return an event of a stream.

    Args:
        data: an object, or text of one line.
        event: its name, if any.
    """
    text = data if isinstance(data, str) else json.dumps(data, ensure_ascii=False)
    return ServerSentEvent(data=text, event=event, sep="\n")
