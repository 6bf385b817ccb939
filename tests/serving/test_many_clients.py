"""Twenty clients at once, a third of whom hang up: all others get what stock answers."""

import random
import threading
from pathlib import Path
from typing import Any

import pytest
from desk_helpers import PATIENCE_S, Heard, ask, desk_of, stock_text, tokens

from headinfer.errors import QueueFullError
from headinfer.serving.events import Event

CLIENTS, ROUNDS = 20, 3
BOUNDS: dict[str, int] = {"llama3": 1536, "gemma3": 1536, "qwen3-next": 2048}
"""Bytes of a token, or more."""


class Client:
    """A client that asks several times, one question after the other."""

    def __init__(self, desk: Any, prompts: list[tuple[int, ...]], number: int) -> None:
        self.wrong: list[str] = []
        self.right = self.cancelled = 0
        self._desk, self._prompts = desk, prompts
        self._random = random.Random(number)
        self.thread = threading.Thread(target=self._ask_all, name=f"client-{number}")

    def _ask_all(self) -> None:
        for _ in range(ROUNDS):
            self._ask(self._random.choice(self._prompts), self._random.random() < 1 / 3)

    def _ask(self, ids: tuple[int, ...], hangs_up: bool) -> None:
        heard, known = Heard(), threading.Event()
        tickets: list[Any] = []
        events = self._random.randrange(1, 14)

        def hear(event: Event) -> None:
            heard(event)
            if hangs_up and len(heard.events) >= events:
                known.wait(PATIENCE_S)
                tickets[0].cancel()

        while not tickets:
            try:
                tickets.append(self._desk.submit(ask(ids), hear))
            except QueueFullError:
                threading.Event().wait(0.05)
        known.set()
        ended = tickets[0].wait(PATIENCE_S)
        if ended is None or ended is not heard.ended:
            self.wrong.append(f"no end: {ended}")
        elif ended.finish_reason == "cancelled" and hangs_up:
            self.cancelled += 1
        elif ended.finish_reason != "length" or heard.text != STOCK[ids]:
            self.wrong.append(f"{ended}: {heard.text!r} for {STOCK[ids]!r}")
        else:
            self.right += 1


STOCK: dict[tuple[int, ...], str] = {}


@pytest.mark.covering(most=1)
@pytest.mark.parametrize(
    "name",
    [pytest.param(each, marks=[pytest.mark.slow] * (each == "qwen3-next")) for each in BOUNDS],
)
def test_many_clients_of_whom_a_third_hang_up(name: str, tmp_path: Path) -> None:
    texts = [tokens(count, seed=count) for count in (60, 150, 260)]
    prompts = [
        (*text, *tokens(5 + 9 * number, seed=number)) for text in texts for number in range(4)
    ]
    STOCK.clear()
    STOCK.update({ids: stock_text(name, ids) for ids in prompts})
    before = set(threading.enumerate())
    bound = 1500 * BOUNDS[name]
    with desk_of(
        name, running=5, waiting=9, kept_memory=f"{bound}B", session_folder=tmp_path
    ) as desk:
        clients = [Client(desk, prompts, number) for number in range(CLIENTS)]
        for client in clients:
            client.thread.start()
        for client in clients:
            client.thread.join(4 * PATIENCE_S)
        assert [wrong for client in clients for wrong in client.wrong] == []
        assert sum(client.right for client in clients) > CLIENTS
        assert sum(client.cancelled for client in clients) > 3
        shelf = desk._served.prefixes._shelf
        shelf._tidy()
        assert shelf.kept_bytes <= bound
        assert desk._served.prefixes._lent == []
        assert all(each.state in ("kept", "saved") for each in desk.slots())
        engines = [each for each in desk._served.session._engines if not each.closed]
        assert len(engines) == len(shelf.kept), "some cache is held by nobody"
    assert set(threading.enumerate()) <= before
