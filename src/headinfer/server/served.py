"""The model that a server serves, and what it is just doing: loading it, ready, or closing."""

import enum
import threading
import time
from dataclasses import dataclass
from typing import Any

from headinfer.server.guide import Guide
from headinfer.server.problems import ProblemError
from headinfer.serving.desk import Desk

DEFAULT_NEW_TOKENS = 4096
"""Tokens of an answer at most where a request does not say."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """A set of limits of requests.

    Attributes:
        body_bytes: of a request's body.
        new_tokens: that an answer may have; None for what the model and memory allow.
        seconds: that a request may take, waiting included; None for any.
    """

    body_bytes: int = 256 * 2**20
    new_tokens: int | None = None
    seconds: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """A loaded model at its desk.

    Attributes:
        name: as the server's user gave it.
        model: of transformers, attached.
        tokenizer: its.
        desk: takes what is asked.
        guide: for answers in JSON.
        positions: that the model was made for; 0 if unknown.
        spelled: whether its messages are told apart by special tokens.
    """

    name: str
    model: Any
    tokenizer: Any
    desk: Desk
    guide: Guide
    positions: int
    spelled: bool = False


class Phase(str, enum.Enum):
    """What a server is doing."""

    LOADING = "loading"
    READY = "ready"
    CLOSING = "closing"


class Service:
    """A server's one model, from before it is loaded until after it is closed.

    Args:
        name: of the model.
        limits: of requests.
        ping_s: seconds between two comments in a stream.
    """

    def __init__(self, name: str, limits: Limits, *, ping_s: float) -> None:
        self.name = name
        self.limits = limits
        self.ping_s = ping_s
        self.begun = int(time.time())
        self._lock = threading.Lock()
        self._closing = threading.Lock()
        self._phase = Phase.LOADING
        self._served: Served | None = None
        self._ended = True

    @property
    def phase(self) -> Phase:
        """What the server is doing."""
        return self._phase

    @property
    def served(self) -> Served:
        """The model.

        Raises:
            ProblemError: it is not there yet, or no more.
        """
        served = self._served
        if self._phase is Phase.READY and served is not None:
            return served
        told = "the model is loading" if self._phase is Phase.LOADING else "the server is stopping"
        raise ProblemError(503, f"{told}; ask again later", code=self._phase.value)

    def ready(self, served: Served) -> bool:
        """Begin to serve; return False where the server is closing already."""
        with self._lock:
            if self._phase is Phase.CLOSING:
                return False
            self._served, self._phase = served, Phase.READY
            return True

    def close(self, timeout_s: float) -> bool:
        """End all that runs and keep its prefixes; a second call waits for the first.

        Args:
            timeout_s: seconds it may take.

        Returns:
            Whether all has ended.
        """
        self.begin_closing()
        with self._closing:
            served, self._served = self._served, None
            if served is not None:
                self._ended = served.desk.close(timeout_s=timeout_s)
            return self._ended

    def begin_closing(self) -> None:
        """Take no new requests."""
        self._phase = Phase.CLOSING  # without the lock, as a signal's handler does this
