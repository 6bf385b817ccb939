"""A server with the page and a small part of the API, whose every answer a test decides."""

import contextlib
import json
import mimetypes
import queue
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

PAGE = Path(__file__).resolve().parents[2] / "src" / "headinfer" / "server" / "page"
DEADLINE_S = 60


class FakeServer:
    """A server that streams what a test sends, and notes what it is asked.

    Attributes:
        key: that it wants; None for none.
        loading: whether its model is loading.
        slots: what `/slots` answers; None for a status of 500.
        sessions: that `/sessions` lists; None without a folder.
        acts: answers to saving and restoring, by the action.
        acted: paths and bodies of those.
        refusal: status and message for the next question, in place of an answer.
        asked: bodies of the questions.
        gone: set once a client left in the middle of an answer.
        paths: that were asked for.
    """

    def __init__(self) -> None:
        self.key: str | None = None
        self.loading = False
        self.slots: list[dict[str, Any]] | None = []
        self.sessions: list[dict[str, Any]] | None = []
        self.acts: dict[str, dict[str, Any]] = {}
        self.acted: list[tuple[str, dict[str, Any]]] = []
        self.refusal: tuple[int, str] | None = None
        self.asked: list[dict[str, Any]] = []
        self.gone = threading.Event()
        self.paths: list[str] = []
        self._steps: queue.Queue[str | None] = queue.Queue()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_port}/"

    def close(self) -> None:
        self.cut()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def send(self, delta: dict[str, Any] | None = None, **more: Any) -> None:
        """Stream an object of an answer."""
        finish = more.pop("finish_reason", None)
        choice = {"index": 0, "delta": delta or {}, "finish_reason": finish}
        self._steps.put(f"data: {json.dumps({'choices': [choice], **more})}\n\n")

    def progress(self, processed: int, total: int, time_ms: int, cache: int = 0) -> None:
        told = {"total": total, "cache": cache, "processed": processed, "time_ms": time_ms}
        self.send(prompt_progress=told)

    def fail(self, message: str) -> None:
        self._steps.put(f"data: {json.dumps({'error': {'message': message}})}\n\n")

    def end(self, finish_reason: str = "stop", *, new_tokens: int = 3) -> None:
        """End an answer as it should."""
        took = {"cache_n": 1024, "prompt_n": 2048, "prompt_ms": 65000.0}
        took |= {"predicted_n": new_tokens, "predicted_ms": 500.0}
        self.send(finish_reason=finish_reason, timings=took, id_slot="abc1")
        self._steps.put("data: [DONE]\n\n")
        self.cut()

    def cut(self) -> None:
        """End the connection of an answer."""
        self._steps.put(None)

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        fake = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_args: Any) -> None:
                pass

            def do_GET(self) -> None:
                fake.paths.append(self.path)
                path = urlsplit(self.path).path
                if path == "/" or path.startswith("/page/"):
                    self._file(PAGE / (path.removeprefix("/page/").lstrip("/") or "index.html"))
                elif self._may_enter():
                    self._api(path)

            def do_POST(self) -> None:
                fake.paths.append(self.path)
                body = self.rfile.read(int(self.headers["Content-Length"]))
                if not self._may_enter():
                    return
                path = urlsplit(self.path)
                if path.path.startswith("/slots/"):
                    fake.acted.append((self.path, json.loads(body)))
                    self._json(200, fake.acts[path.query.removeprefix("action=")])
                    return
                fake.asked.append(json.loads(body))
                if fake.refusal is not None:
                    (status, message), fake.refusal = fake.refusal, None
                    self._json(status, {"error": {"message": message}})
                    return
                self.send_response(200)
                self.send_header("Content-Type", "text/event-stream")
                self.end_headers()
                self._stream()

            def _api(self, path: str) -> None:
                if fake.loading:
                    self._json(503, {"error": {"message": "the model is loading"}})
                elif path == "/v1/models":
                    self._json(200, {"data": [{"id": "fake-8b", "max_model_len": 131072}]})
                elif path == "/slots" and fake.slots is not None:
                    self._json(200, fake.slots)
                elif path == "/sessions":
                    self._json(
                        200, {"enabled": fake.sessions is not None, "data": fake.sessions or []}
                    )
                else:
                    self._json(500 if path == "/slots" else 404, {"error": {"message": path}})

            def _may_enter(self) -> bool:
                wanted = fake.key
                if wanted is None or self.headers.get("Authorization") == f"Bearer {wanted}":
                    return True
                self._json(401, {"error": {"message": "this server wants an API key"}})
                return False

            def _stream(self) -> None:
                while True:
                    try:
                        step = fake._steps.get(timeout=0.05)
                    except queue.Empty:
                        step = ": ping\r\n\r\n"
                    if step is None:
                        return
                    try:
                        self.wfile.write(step.encode())
                        self.wfile.flush()
                    except OSError:
                        fake.gone.set()
                        return

            def _file(self, path: Path) -> None:
                self._answer(200, mimetypes.guess_type(path.name)[0] or "", path.read_bytes())

            def _json(self, status: int, body: Any) -> None:
                self._answer(status, "application/json", json.dumps(body).encode())

            def _answer(self, status: int, kind: str, body: bytes) -> None:
                with contextlib.suppress(OSError):  # the page may be closed by now
                    self.send_response(status)
                    self.send_header("Content-Type", kind)
                    self.send_header("Content-Length", str(len(body)))
                    self.end_headers()
                    self.wfile.write(body)

        return Handler
