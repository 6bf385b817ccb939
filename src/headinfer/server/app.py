"""The application: which path is answered by what."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from anyio import to_thread
from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, PlainTextResponse, Response
from fastapi.staticfiles import StaticFiles
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp

import headinfer
from headinfer.errors import HeadInferError
from headinfer.server import asking
from headinfer.server.answering import Answering
from headinfer.server.bodies import ChatBody, CompletionBody, ResponseBody, SlotBody
from headinfer.server.callers import Callers
from headinfer.server.chat import ChatReply
from headinfer.server.completions import CompletionReply
from headinfer.server.gate import Gate
from headinfer.server.metrics import Metrics
from headinfer.server.mistakes import mistake_of
from headinfer.server.origins import open_to
from headinfer.server.parsing import MessageParser, parser_of
from headinfer.server.problems import ProblemError, missing_path, problem_of
from headinfer.server.responses import ResponseReply
from headinfer.server.served import Phase, Served, Service
from headinfer.server.slots import restore_slot, save_slot, session_list, slot_dicts

PAGE = Path(__file__).parent / "page"

_UNREADABLE = "There was an error parsing the body"
"""What FastAPI says of a body that Python's JSON cannot read."""

_JSON: dict[str, Any] = {"content": {"application/json": {}}}
_ERROR_RESPONSES: dict[int | str, dict[str, Any]] = {
    "4XX": {"description": "The request is wrong, or there are too many.", **_JSON},
    "5XX": {"description": "The server is loading, stopping, or failed.", **_JSON},
}
_ANSWERS: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The answer, or the stream in which it comes.",
        "content": {"application/json": {}, "text/event-stream": {}},
    }
}


def make_app(
    service: Service,
    *,
    keys: Sequence[str] = (),
    origins: Sequence[str] = (),
    own_hosts: Sequence[str] | None = None,
    debug: bool = False,
) -> ASGIApp:
    """Return the application of one model.

    Args:
        service: the model, which may be loading.
        keys: of which each request must bring one; none to let all enter.
        origins: of other web pages that may call it.
        own_hosts: what it may be called, as `Callers` takes them.
        debug: whether stderr has the whole of errors that nobody foresaw.
    """
    metrics = Metrics(service)
    app = FastAPI(
        title="HeadInfer",
        version=headinfer.__version__,
        description=headinfer.__doc__ or "",
        docs_url=None,  # both load scripts of others
        redoc_url=None,
        responses=_ERROR_RESPONSES,
    )
    _add_errors(app)
    _add_model(app, service, metrics)
    _add_operation(app, service, metrics)
    _add_page(app)
    paths = {getattr(route, "path", "") for route in app.routes}
    gate = Gate(
        app,
        callers=Callers(origins, own_hosts),
        keys=keys,
        body_bytes=service.limits.body_bytes,
        debug=debug,
        on_answer=lambda method, path, status: metrics.answered(
            method, path, status, path in paths
        ),
    )
    return open_to(gate, origins)  # so that pages can read what the gate refuses


def _add_errors(app: FastAPI) -> None:
    """Have all errors in OpenAI's form."""

    @app.exception_handler(HeadInferError)
    async def _(_request: Request, error: HeadInferError) -> Response:
        return problem_of(error).response()

    @app.exception_handler(ProblemError)
    async def _(_request: Request, error: ProblemError) -> Response:
        return error.response()

    @app.exception_handler(Exception)
    async def _(_request: Request, _error: Exception) -> Response:
        # It is raised again behind this, and the gate logs it.
        return ProblemError(500, "the server failed at this request, and goes on").response()

    @app.exception_handler(HTTPException)
    async def _(request: Request, error: HTTPException) -> Response:
        headers = dict(error.headers or {})
        if error.status_code in (404, 405):
            told = missing_path(app.routes, request.method, request.url.path, error.status_code)
        elif error.detail == _UNREADABLE:
            told = "the body is not JSON; it must be UTF-8, not compressed, and not nested deeply"
        else:
            told = str(error.detail)
        return ProblemError(error.status_code, told).response(headers)

    @app.exception_handler(RequestValidationError)
    async def _(_request: Request, error: RequestValidationError) -> Response:
        return mistake_of(error).response()


def _add_model(app: FastAPI, service: Service, metrics: Metrics) -> None:
    """Add what asks the model."""

    def served() -> Served:
        return service.served

    Model = Annotated[Served, Depends(served)]
    answering = Answering(service, metrics.ended)

    @app.get("/v1/models")
    def models(served: Model) -> dict[str, Any]:
        """List the one model."""
        return {"object": "list", "data": [_model(served, service)]}

    @app.get("/v1/models/{name:path}")
    def model(name: str, served: Model) -> dict[str, Any]:
        """Describe the model."""
        answering.check_name(name)
        return _model(served, service)

    @app.post("/v1/chat/completions", response_model=None, responses=_ANSWERS)
    async def chat(body: ChatBody, request: Request, served: Model) -> Response:
        """Continue a conversation."""
        answering.check_name(body.model)
        asks = await to_thread.run_sync(asking.chat_request, served, body, service.limits)

        def parser() -> MessageParser:
            return _parser(served, asks)

        options = body.stream_options
        reply = ChatReply(
            service.name,
            parser,
            bytes_of=served.guide.bytes_of if body.logprobs else None,
            progress=bool(body.return_progress),
            include_usage=bool(options and options.include_usage),
        )
        return await answering.answer(request, served, asks, reply, stream=bool(body.stream))

    @app.post("/v1/completions", response_model=None, responses=_ANSWERS)
    async def complete(body: CompletionBody, request: Request, served: Model) -> Response:
        """Continue texts."""
        answering.check_name(body.model)
        asks = await to_thread.run_sync(asking.completion_request, served, body, service.limits)
        options = body.stream_options
        reply = CompletionReply(
            service.name,
            body.n or 1,
            served.guide.bytes_of,
            progress=bool(body.return_progress),
            include_usage=bool(options and options.include_usage),
        )
        return await answering.answer(request, served, asks, reply, stream=bool(body.stream))

    @app.post("/v1/responses", response_model=None, responses=_ANSWERS)
    async def respond(body: ResponseBody, request: Request, served: Model) -> Response:
        """Respond to items."""
        answering.check_name(body.model)
        asks = await to_thread.run_sync(asking.response_request, served, body, service.limits)
        reply = ResponseReply(service.name, body, _parser(served, asks))
        return await answering.answer(request, served, asks, reply, stream=bool(body.stream))


def _parser(served: Served, asks: asking.Request) -> MessageParser:
    """Return a parser for a choice of a conversation's answer."""
    return parser_of(
        *(served.model, served.tokenizer, asks.asks[0].ids, asks.tools),
        spelled=asks.spelled,
        one_call=asks.one_call,
    )


def _model(served: Served, service: Service) -> dict[str, Any]:
    return {
        "id": service.name,
        "object": "model",
        "created": service.begun,
        "owned_by": "headinfer",
        "max_model_len": served.positions or None,
    }


def _add_operation(app: FastAPI, service: Service, metrics: Metrics) -> None:
    """Add what whoever runs the server asks."""

    @app.head("/health", include_in_schema=False)  # which proxies and watchers ask
    @app.get("/health")
    async def health() -> JSONResponse:
        """Tell whether requests are taken."""
        ready = service.phase is Phase.READY
        told = {"status": "ok" if ready else service.phase.value}
        return JSONResponse(told, 200 if ready else 503)

    @app.get("/metrics", response_class=PlainTextResponse)
    def numbers() -> Response:
        """Return what was counted, for Prometheus."""
        return Response(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/slots")
    def slots() -> list[dict[str, Any]]:
        """List requests and kept prefixes, with what they hold and how far they are."""
        return slot_dicts(service.served.desk.slots())

    @app.post("/slots/{slot_id}")
    def act_on_slot(
        slot_id: str, action: Literal["save", "restore"], body: SlotBody
    ) -> dict[str, Any]:
        """Save a slot as a session, or have a session as a slot again, whatever the id."""
        desk = service.served.desk
        return save_slot(desk, slot_id, body) if action == "save" else restore_slot(desk, body)

    @app.get("/sessions")
    def sessions() -> dict[str, Any]:
        """List the sessions that can be restored, the newest first."""
        return session_list(service.served.desk.sessions())


def _add_page(app: FastAPI) -> None:
    """Add the page, where this installation has it."""
    if not (PAGE / "index.html").is_file():
        return

    @app.api_route("/", methods=["GET", "HEAD"], include_in_schema=False)
    async def page() -> FileResponse:
        return FileResponse(PAGE / "index.html")

    app.mount("/page", StaticFiles(directory=PAGE))
