"""Asks of a desk, and what comes of them."""

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import torch

import headinfer
from headinfer.serving.ask import Ask
from headinfer.serving.desk import Desk
from headinfer.serving.events import Ended, Event, Piece, Progress, Queued
from saved_models import make_tokenizer
from tiny_models import VOCAB, random_tokens, shared_model

SMALL: dict[str, Any] = {"chunk_tokens": 16, "tile_tokens": 8}
PATIENCE_S = 120.0
SETTINGS: dict[str, Any] = {"do_sample": False, "repetition_penalty": 1.8}
"""Without a penalty a tiny model says one word again and again."""


class Heard:
    """What one client hears."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.threads: set[int] = set()

    def __call__(self, event: Event) -> None:
        self.threads.add(threading.get_ident())
        self.events.append(event)

    @property
    def text(self) -> str:
        return "".join(event.text for event in self.events if isinstance(event, Piece))

    @property
    def pieces(self) -> list[Piece]:
        return [event for event in self.events if isinstance(event, Piece)]

    @property
    def progress(self) -> list[Progress]:
        return [event for event in self.events if isinstance(event, Progress)]

    @property
    def places(self) -> list[int]:
        return [event.position for event in self.events if isinstance(event, Queued)]

    @property
    def ended(self) -> Ended:
        (ended,) = [event for event in self.events if isinstance(event, Ended)]
        assert self.events[-1] is ended
        return ended


@contextlib.contextmanager
def desk_of(name: str, *, options: dict[str, Any] | None = None, **keywords: Any) -> Iterator[Desk]:
    """A desk in front of a tiny model, which is closed and detached at the end."""
    model = shared_model(name)
    headinfer.attach(model, **{"device": "cpu", **SMALL, **(options or {})})
    try:
        desk = Desk(model, make_tokenizer(VOCAB), **keywords)
        try:
            yield desk
        finally:
            desk.close(timeout_s=PATIENCE_S)
    finally:
        headinfer.detach(model)


def tokens(count: int, seed: int = 0) -> tuple[int, ...]:
    return tuple(random_tokens(1, count, seed=seed)[0].tolist())


def ask(ids: tuple[int, ...], new_tokens: int = 8, **keywords: Any) -> Ask:
    given = {"max_new_tokens": new_tokens, **SETTINGS, **keywords.pop("given", {})}
    return Ask(ids=ids, given=given, **keywords)


def answer(desk: Desk, asked: Ask, heard: Heard | None = None) -> Heard:
    """Ask and wait for the end."""
    heard = heard or Heard()
    ended = desk.submit(asked, heard).wait(PATIENCE_S)
    assert ended is heard.ended
    return heard


def stock_text(name: str, ids: tuple[int, ...], new_tokens: int = 8, **settings: Any) -> str:
    """What stock transformers answers."""
    prompt = torch.tensor([ids])
    rows = shared_model(name).generate(
        prompt,
        attention_mask=torch.ones_like(prompt),  # or it would take a token for padding
        max_new_tokens=new_tokens,
        **{**SETTINGS, **settings},
    )
    return str(make_tokenizer(VOCAB).decode(rows[0, len(ids) :], skip_special_tokens=True))
