"""A server as a process of its own, and what is asked of it."""

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2

PROJECT = Path(__file__).resolve().parents[2]
FACT = "The strongbox of the mossy phoenix opens with 41-27."
QUESTION = "What opens the strongbox of the mossy phoenix?"
WAIT_S = 60.0


@dataclass
class Running:
    """A server that runs, until it is told to end."""

    process: "subprocess.Popen[str]"
    url: str
    key: str | None = None

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.key}"} if self.key else {}

    def get(self, path: str) -> httpx2.Response:
        return httpx2.get(self.url + path, headers=self.headers, timeout=WAIT_S)

    def post(self, path: str, **body: Any) -> httpx2.Response:
        headers = self.headers | {"Content-Type": "application/json"}
        content = json.dumps(body)  # which takes halves of characters, too
        return httpx2.post(self.url + path, content=content, headers=headers, timeout=WAIT_S)

    @contextmanager
    def stream(self, path: str, **body: Any) -> Iterator[httpx2.Response]:
        body["stream"] = True
        with httpx2.stream(
            "POST", self.url + path, json=body, headers=self.headers, timeout=WAIT_S
        ) as response:
            yield response

    def wait_ready(self) -> None:
        wait_until(lambda: self.get("/health").status_code == 200)

    def wait_idle(self) -> None:
        """Wait until no request runs or waits."""
        wait_until(lambda: all(slot["state"] in ("kept", "saved") for slot in self.slots()))

    def slots(self) -> list[dict[str, Any]]:
        return self.get("/slots").json()

    def end(self, number: int = signal.SIGTERM) -> tuple[int, str]:
        """Ask it to end; return its exit code and what it wrote to stderr."""
        self.process.send_signal(number)
        _, err = self.process.communicate(timeout=WAIT_S)
        return self.process.returncode, err


def wait_until(condition: Any) -> None:
    until = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < until, "it did not come to pass"
        time.sleep(0.05)


def command(*args: object) -> list[str]:
    return [sys.executable, "-m", "headinfer.cli.main", *map(str, args)]


def environment(**more: str) -> dict[str, str]:
    own = {"PYTHONPATH": str(PROJECT / "src"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return os.environ | own | more


@contextmanager
def running(*args: object, key: str | None = None, ready: bool = True) -> Iterator[Running]:
    """Run a server on the CPU at a free port, and kill it at the end if it still runs."""
    keyed = ("--api-key", key) if key else ()
    process = subprocess.Popen(
        command("serve", "--port", 0, "--device", "cpu", *keyed, *args),
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        assert url, process.stderr.read()  # type: ignore[union-attr]
        server = Running(process, url, key)
        if ready:
            server.wait_ready()
        yield server
    finally:
        if process.poll() is None:
            process.kill()
            process.communicate()


def events(response: httpx2.Response) -> Iterator[dict[str, Any]]:
    """Yield the objects of a stream, without the mark at its end."""
    for line in response.iter_lines():
        if line.startswith("data: ") and line != "data: [DONE]":
            yield json.loads(line.removeprefix("data: "))


def in_thread(work: Any) -> "queue.Queue[Any]":
    """Do something in a thread; its result comes through the queue."""
    done: queue.Queue[Any] = queue.Queue()
    threading.Thread(target=lambda: done.put(work()), daemon=True).start()
    return done


def ask(server: Running, *said: str, new_tokens: int = 4) -> dict[str, Any]:
    """Ask with messages of the user and answers in turn."""
    roles = ("user", "assistant")
    messages = [{"role": roles[place % 2], "content": text} for place, text in enumerate(said)]
    body = {"messages": messages, "max_tokens": new_tokens, "temperature": 0}
    return server.post("/v1/chat/completions", **body).json()


def act(server: Running, action: str, slot_id: Any, filename: str, **more: Any) -> Any:
    return server.post(f"/slots/{slot_id}?action={action}", filename=filename, **more)


def text_of(answer: dict[str, Any]) -> str:
    return answer["choices"][0]["message"]["content"]


def cached(answer: dict[str, Any]) -> int:
    return answer["usage"]["prompt_tokens_details"]["cached_tokens"]
