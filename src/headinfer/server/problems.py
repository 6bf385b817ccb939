"""What goes wrong with a request, as an HTTP status and in the form of OpenAI's errors."""

from collections.abc import Sequence
from typing import Any

from starlette.responses import JSONResponse
from starlette.routing import BaseRoute

from headinfer.errors import (
    ContextLengthError,
    DeskClosedError,
    HeadInferError,
    MemoryPlanError,
    OptionError,
    QueueFullError,
    SessionBusyError,
    SessionFileError,
    SessionRoomError,
    UnsupportedModelError,
)

_KINDS = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    413: "invalid_request_error",
    429: "rate_limit_error",
}
_MOST_PATH = 100
_RETRY_S = 5
"""Seconds after which a client may ask again, where the server is not ready."""


class ProblemError(Exception):
    """A request that is not answered, and what its client is told."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code

    def as_dict(self) -> dict[str, Any]:
        """Return the body of OpenAI's errors."""
        kind = _KINDS.get(self.status, "invalid_request_error" if self.status < 500 else "")
        return {
            "error": {
                "message": self.message,
                "type": kind or "server_error",
                "param": self.param,
                "code": self.code,
            }
        }

    def response(self, headers: dict[str, str] | None = None) -> JSONResponse:
        """Return the response.

        Args:
            headers: further ones.
        """
        told = dict(headers or {})
        if self.status in (429, 503):
            told["Retry-After"] = str(_RETRY_S)
        if self.status == 401:
            told["WWW-Authenticate"] = "Bearer"
        return JSONResponse(self.as_dict(), self.status, told)


def missing_path(routes: Sequence[BaseRoute], method: str, path: str, status: int) -> str:
    """Return what a client is told that asked for a path or method that is not there.

    Args:
        routes: of the application.
        method: of the request.
        path: of the request, without its query.
        status: 404 or 405.
    """
    if status == 405:
        return f"{path[:_MOST_PATH]} does not take {method[:_MOST_PATH]}"
    served = [str(getattr(route, "path", "")) for route in routes]
    end = path.rstrip("/").rpartition("/v1/")[2].lstrip("/")
    there = f"/v1/{end}"
    if there in served and there != path:
        return f"nothing is served at {path[:_MOST_PATH]}; the base URL must end in /v1, once"
    kinds = ", ".join(each for each in served if each.startswith("/v1/") and "{" not in each)
    return f"nothing is served at {path[:_MOST_PATH]}; this server has {kinds}, and others"


def problem_of(error: HeadInferError) -> ProblemError:
    """Return what a client is told of an error of ours.

    Args:
        error: by the request where its kind says so, else by the server.
    """
    message = " ".join(str(error).split())
    if isinstance(error, QueueFullError):
        return ProblemError(429, message, code="queue_full")
    if isinstance(error, DeskClosedError):
        return ProblemError(503, message, code="closing")
    if isinstance(error, (ContextLengthError, MemoryPlanError)):
        return ProblemError(400, message, code="context_length_exceeded")
    if isinstance(error, SessionRoomError):
        return ProblemError(507, message, code="disk_full")
    if isinstance(error, SessionBusyError):
        return ProblemError(409, message, code="session_busy")
    if isinstance(error, SessionFileError) and not isinstance(error.__cause__, OSError):
        return ProblemError(400, message, param="filename")
    if isinstance(error, (OptionError, UnsupportedModelError)):
        return ProblemError(400, message)
    return ProblemError(500, message)
