"""From a request that was understood to its answer, at once or as a stream."""

import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Any, Protocol

import anyio
from fastapi import Request
from fastapi.responses import JSONResponse, Response
from sse_starlette import EventSourceResponse, ServerSentEvent
from starlette.types import Message

from headinfer.server.asking import Request as Asks
from headinfer.server.listening import Asked
from headinfer.server.problems import ProblemError
from headinfer.server.served import Served, Service
from headinfer.serving.events import Ended

_FAREWELL_S = 3.0
"""Seconds in which streams may end by themselves once the desk is closed."""

_GONE = 499
"""Status of an answer that nobody waits for, which is only counted."""


class Reply(Protocol):
    """A writer of one kind of answer."""

    async def whole(self, asked: Asked) -> dict[str, Any]:
        """Return the answer once it is there."""

    def stream(self, asked: Asked) -> AsyncIterator[ServerSentEvent]:
        """Yield the answer as it comes."""


class Answering:
    """A server's way of answering all kinds of requests.

    Args:
        service: the model.
        on_ended: told of each choice that ended.
    """

    def __init__(self, service: Service, on_ended: Callable[[Ended], None]) -> None:
        self._service = service
        self._on_ended = on_ended

    def check_name(self, name: str | None) -> None:
        """Refuse another model than the one that is served.

        Raises:
            ProblemError: it is another.
        """
        if name and name != self._service.name:
            raise ProblemError(
                404,
                f"model {name[:100]!r} is not served here; this server has {self._service.name}",
                param="model",
                code="model_not_found",
            )

    async def answer(
        self, request: Request, served: Served, asks: Asks, reply: Reply, *, stream: bool
    ) -> Response:
        """Return the answer, or the stream in which it will come.

        Args:
            request: whose client may go away.
            served: the model.
            asks: what is asked.
            reply: writes the answer.
            stream: whether it comes as a stream.

        Raises:
            HeadInferError: it is not had.
            ProblemError: the same.
        """
        asked = Asked(
            served.desk,
            asks.asks,
            seconds=self._service.limits.seconds,
            on_ended=self._on_ended,
        )
        await asked.start()
        if not stream:
            return await _whole(request, asked, reply)

        async def gone(_message: Message) -> None:
            asked.cancel()

        return EventSourceResponse(
            reply.stream(asked),
            ping=self._service.ping_s,
            sep="\n",
            client_close_handler_callable=gone,
            shutdown_event=anyio.Event(),
            shutdown_grace_period=_FAREWELL_S,
        )


async def _whole(request: Request, asked: Asked, reply: Reply) -> Response:
    """Return a whole answer, unless its client goes away before it is there."""
    body: dict[str, Any] | None = None
    problem: ProblemError | None = None
    async with anyio.create_task_group() as tasks:

        async def watch() -> None:
            with contextlib.suppress(RuntimeError):
                while (await request.receive())["type"] != "http.disconnect":
                    pass
            asked.cancel()
            tasks.cancel_scope.cancel()

        tasks.start_soon(watch)
        try:
            body = await reply.whole(asked)
        except ProblemError as error:
            problem = error
        tasks.cancel_scope.cancel()
    if problem is not None:
        return problem.response()
    return Response(status_code=_GONE) if body is None else JSONResponse(body)
