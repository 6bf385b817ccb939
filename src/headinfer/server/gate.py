"""What stands before all requests: callers, keys, sizes of bodies, and errors nobody foresaw."""

import hmac
import logging
import traceback
from collections.abc import Callable, Sequence
from typing import Any

from fastapi import HTTPException
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from headinfer.server.callers import Callers
from headinfer.server.problems import ProblemError
from headinfer.units import format_bytes

_logger = logging.getLogger(__name__)

_OPEN = frozenset({"/", "/health"})
"""Paths that need no key: whether the server is there, and the page, which asks for a key."""

_PAGE = "/page/"

_CLOSING = {"Connection": "close"}
"""Header for bodies that are not read: the rest would be taken for the next request."""


class Gate:
    """A gate before an application, which only lets through what may enter.

    Args:
        app: of ASGI.
        callers: tells which web pages' requests are taken.
        keys: of which a request must bring one; none to let all enter.
        body_bytes: the most that a body may have.
        debug: whether stderr has the whole of an error, which may quote requests.
        on_answer: told of each answer: method, path, and status.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        callers: Callers,
        keys: Sequence[str],
        body_bytes: int,
        debug: bool,
        on_answer: Callable[[str, str, int], None],
    ) -> None:
        self._app = app
        self._callers = callers
        self._keys = [key.encode() for key in keys]
        self._body_bytes = body_bytes
        self._debug = debug
        self._on_answer = on_answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status = 0

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        problem = self._refused(scope)
        try:
            if problem is None:
                await self._app(scope, _bounded(receive, self._body_bytes), sending)
        except ProblemError as error:
            problem = error
        except Exception as error:
            self._tell(scope, error)
            problem = ProblemError(500, "the server failed at this request, and goes on")
        if problem is not None and not status:
            headers = _CLOSING if problem.status == 413 else None
            await problem.response(headers)(scope, receive, sending)
        self._on_answer(scope["method"], scope["path"], status)

    def _refused(self, scope: Scope) -> ProblemError | None:
        headers = Headers(scope=scope)
        if (refusal := self._callers.refusal(headers)) is not None:
            return refusal
        path = scope["path"]
        free = path in _OPEN or path.startswith(_PAGE)
        if self._keys and not free and not self._knows(_key(headers)):
            return ProblemError(
                401,
                "this API key is not known here; send another as Authorization: Bearer KEY"
                if _key(headers)
                else "this server wants an API key: Authorization: Bearer KEY",
                code="invalid_api_key",
            )
        length = headers.get("content-length", "0")
        if length.isdecimal() and int(length) > self._body_bytes:
            return _too_large(self._body_bytes)
        return None

    def _knows(self, key: bytes) -> bool:
        # Each is compared in full, so that the time it takes tells nothing.
        matches = [hmac.compare_digest(key, known) for known in self._keys]
        return any(matches)

    def _tell(self, scope: Scope, error: Exception) -> None:
        """Log an error by its kind and place; what it says may quote a request."""
        if self._debug:
            traceback.print_exception(error)
        frames = traceback.extract_tb(error.__traceback__)
        place = f"{frames[-1].filename}:{frames[-1].lineno}" if frames else "nowhere"
        kind = type(error).__name__
        _logger.warning("%s %s failed: %s at %s", scope["method"], scope["path"], kind, place)


def _key(headers: Headers) -> bytes:
    kind, _, key = headers.get("authorization", "").partition(" ")
    if kind.lower() == "bearer":
        return key.strip().encode()
    return headers.get("x-api-key", "").encode()


def _bounded(receive: Receive, most: int) -> Receive:
    """Return a `receive` that raises once a body is too large, whatever its header says."""
    taken = 0

    async def receiving() -> Any:
        nonlocal taken
        message = await receive()
        taken += len(message.get("body", b""))
        if taken > most:
            # The one kind of error that FastAPI lets pass while it reads a body.
            raise HTTPException(413, _too_large(most).message, _CLOSING)
        return message

    return receiving


def _too_large(most: int) -> ProblemError:
    return ProblemError(
        413, f"the body is larger than this server takes, {format_bytes(most)} (--max-body)"
    )
