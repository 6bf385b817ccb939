"""What a request tells whoever asked, in the order in which it happens."""

from dataclasses import dataclass
from typing import Literal, TypeAlias

from headinfer.errors import HeadInferError

EndReason = Literal["stop", "length", "time", "cancelled", "error"]


@dataclass(frozen=True, slots=True)
class Queued:
    """A place in the queue, told when it changes; a request that begins at once tells none.

    Attributes:
        position: requests that begin before it; 0 is next.
    """

    position: int


@dataclass(frozen=True, slots=True)
class Progress:
    """A prompt's progress, told before its first chunk and after each.

    Attributes:
        total: tokens of the prompt.
        cached: of them, those that need not be read again.
        processed: tokens done, the cached ones included.
        time_ms: milliseconds since the request began.
    """

    total: int
    cached: int
    processed: int
    time_ms: float


@dataclass(frozen=True, slots=True)
class TokenScore:
    """A score of one token of the answer.

    Attributes:
        token_id: the token.
        text: it alone; a part of a character gives the replacement character.
        logprob: natural logarithm of its probability by the model's own logits.
        top: id, text and log-probability of each of the likeliest tokens, best first.
    """

    token_id: int
    text: str
    logprob: float
    top: tuple[tuple[int, str, float], ...]


@dataclass(frozen=True, slots=True)
class Piece:
    """A piece of the answer.

    Attributes:
        text: new since the piece before; it may be empty where there are tokens without text.
        tokens: scores of the tokens that gave it, where scores were asked for.
    """

    text: str
    tokens: tuple[TokenScore, ...]


@dataclass(frozen=True, slots=True)
class Usage:
    """A count of what a request took.

    Attributes:
        prompt_tokens: of the prompt.
        cached_tokens: of them, those that were not read again.
        completion_tokens: of the answer.
        prefill_s: seconds that the model took for the prompt.
        decode_s: seconds that it took for the tokens after the first.
        drafted_tokens: drafts that were verified.
        accepted_tokens: of them, those that were right.
    """

    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    prefill_s: float
    decode_s: float
    drafted_tokens: int = 0
    accepted_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Ended:
    """An end of a request; the last that it tells.

    Attributes:
        finish_reason: "stop" for an end token or a stop string, "length" for `max_new_tokens`,
            "time" for `max_time`, "cancelled", or "error".
        usage: what it took.
        stop: the stop string that came, if one did.
        error: what it failed with, if it did.
        slot_id: of the slot that keeps what was read and answered, if one does.
    """

    finish_reason: EndReason
    usage: Usage
    stop: str | None
    error: HeadInferError | None
    slot_id: str | None = None


Event: TypeAlias = Queued | Progress | Piece | Ended
