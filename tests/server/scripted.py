"""A desk that says what a test wrote down, and a server of it in a thread of this process."""

import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import uvicorn
from server_parts import WAIT_S, Running, wait_until

from headinfer.errors import HeadInferError, OptionError, SessionFileError
from headinfer.server.app import make_app
from headinfer.server.guide import Guide
from headinfer.server.served import Limits, Served, Service
from headinfer.serving.events import Ended, Event, Piece, Usage
from saved_models import make_tokenizer

TEMPLATE = (
    "{% if tools %}<user> {% for tool in tools %}{{ tool['function']['name'] }} {% endfor %}"
    "{% endif %}{% for message in messages %}<user> {{ message['content'] }}"
    "{% for call in message.get('tool_calls', []) %} {{ call['function']['name'] }}"
    "{% endfor %} {% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


@dataclass
class Pause:
    """A place in a script where it waits: for a signal, or for as long as a chunk takes."""

    until: threading.Event = field(default_factory=threading.Event)


@dataclass
class ScriptedTicket:
    id: str
    cancelled: threading.Event = field(default_factory=threading.Event)

    def cancel(self) -> None:
        self.cancelled.set()


class ScriptedDesk:
    """A desk whose answers are lists of events and of texts.

    Attributes:
        scripts: of the next requests, in their order; the last one is said again.
        asks: what was asked.
        tickets: of each.
    """

    def __init__(self, *scripts: Sequence[Any]) -> None:
        self.scripts = list(scripts)
        self.uses_marks = False
        self.refuse: HeadInferError | None = None
        self.asks: list[Any] = []
        self.tickets: list[ScriptedTicket] = []
        self.closed = False

    def check(self, ask: Any) -> None:
        if self.refuse is not None:
            raise self.refuse

    def check_text(self, text: str) -> None:
        pass

    def submit(self, ask: Any, on_event: Any) -> ScriptedTicket:
        number = len(self.asks)
        script = self.scripts[min(number, len(self.scripts) - 1)]
        ticket = ScriptedTicket(f"ticket-{number}")
        self.asks.append(ask)
        self.tickets.append(ticket)
        threading.Thread(target=self._say, args=(script, ticket, on_event), daemon=True).start()
        return ticket

    def _say(self, script: Sequence[Any], ticket: ScriptedTicket, on_event: Any) -> None:
        pieces = 0
        for part in script:
            if isinstance(part, Pause):
                until = time.monotonic() + WAIT_S
                while not (part.until.is_set() or ticket.cancelled.is_set()):
                    assert time.monotonic() < until
                    time.sleep(0.01)
            elif isinstance(part, str):
                on_event(Piece(part, ()))
                pieces += 1
            else:
                on_event(part)
            if isinstance(part, Ended):
                return
            if ticket.cancelled.is_set():
                break
        reason = "cancelled" if ticket.cancelled.is_set() else "stop"
        on_event(ended(reason, pieces))

    def slots(self) -> list[Any]:
        return []

    def sessions(self) -> list[Any]:
        return []

    def save_slot(self, slot_id: str, name: str, messages: Any = None) -> Any:
        raise OptionError(f"there is no slot {slot_id!r}")

    def restore_slot(self, name: str) -> Any:
        raise SessionFileError(f"there is no session {name!r}")

    def close(self, *, timeout_s: float) -> bool:
        self.closed = True
        for ticket in self.tickets:
            ticket.cancel()
        return True


def ended(reason: Any, tokens: int = 1, error: HeadInferError | None = None) -> Event:
    return Ended(reason, Usage(5, 2, tokens, 0.5, 0.25), None, error)


@contextmanager
def serving(
    desk: ScriptedDesk | None,
    *,
    model_type: str = "qwen3",
    tokenizer: Any = None,
    limits: Limits | None = None,
    ping_s: float = 0.1,
) -> Iterator[tuple[str, Service]]:
    """Serve a scripted desk, or none, as while a model is loading; yield its URL."""
    served = None
    if desk is not None:
        tokenizer = tokenizer or make_tokenizer()
        tokenizer.chat_template = TEMPLATE
        model = SimpleNamespace(
            config=SimpleNamespace(model_type=model_type),
            get_input_embeddings=lambda: SimpleNamespace(weight=SimpleNamespace(shape=(96, 8))),
        )
        guide = Guide(tokenizer, len(tokenizer), frozenset({2}))
        served = Served(
            name="scripted",
            model=model,
            tokenizer=tokenizer,
            desk=desk,  # type: ignore[arg-type]
            guide=guide,
            positions=0,
        )
    with listening(served, limits=limits, ping_s=ping_s) as (url, service):
        yield url, service


@contextmanager
def listening(
    served: Served | None, *, limits: Limits | None = None, ping_s: float = 0.1
) -> Iterator[tuple[str, Service]]:
    """Serve a model in this process, or none."""
    service = Service("scripted", limits or Limits(), ping_s=ping_s)
    if served is not None:
        service.ready(served)
    bound = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(
        uvicorn.Config(make_app(service), log_level="warning", lifespan="off", ws="none")
    )
    thread = threading.Thread(target=server.run, args=([bound],), daemon=True)
    thread.start()
    wait_until(lambda: server.started)
    try:
        yield f"http://127.0.0.1:{bound.getsockname()[1]}", service
    finally:
        server.should_exit = server.force_exit = True
        thread.join(WAIT_S)


@contextmanager
def tiny_server(folder: Any, **desk: Any) -> Iterator[Running]:
    """Serve a tiny model's folder in this process, at a desk of its own."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    with model_server(model, tokenizer, **desk) as server:
        yield server


@contextmanager
def model_server(model: Any, tokenizer: Any, **desk: Any) -> Iterator[Running]:
    """Serve a model in this process, at a desk of its own."""
    import headinfer
    from headinfer.serving.desk import Desk

    headinfer.attach(model, device="cpu", chunk_tokens=64)
    made = Desk(model, tokenizer, **desk)
    served = Served(
        name="scripted",
        model=model,
        tokenizer=tokenizer,
        desk=made,
        guide=Guide(tokenizer, model.config.vocab_size, frozenset({2})),
        positions=0,
    )
    with listening(served, ping_s=WAIT_S) as (url, service):
        yield Running(None, url)  # type: ignore[arg-type]
        service.close(WAIT_S)
