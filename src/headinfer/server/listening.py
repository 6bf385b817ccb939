"""What becomes of a request's asks, as events that a coroutine waits for.

Events come in the threads of the desk. They are handed to the event loop, which never waits
for them.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace

from anyio import to_thread

from headinfer.errors import QueueFullError
from headinfer.serving.ask import Ask
from headinfer.serving.desk import Desk, Ticket
from headinfer.serving.events import Ended, Event

_AGAIN_S = 0.2
"""Seconds between two tries of a request's next choice, where the queue is full."""


class Asked:
    """A request's asks at a desk, one after the other: their turns would not be more all at once.

    So the prompt is read once, and the other choices have it from there.

    Args:
        desk: that answers.
        asks: of the choices.
        seconds: that all of it may take; None for any time.
        on_ended: told of each end, whoever waits for it.
    """

    def __init__(
        self,
        desk: Desk,
        asks: Sequence[Ask],
        *,
        seconds: float | None,
        on_ended: Callable[[Ended], None],
    ) -> None:
        self._desk = desk
        self._asks = asks
        self._until = None if seconds is None else time.monotonic() + seconds
        self._late = False
        self._gone = False
        self._on_ended = on_ended
        self._queue: asyncio.Queue[Event] = asyncio.Queue()
        self._ticket: Ticket | None = None

    async def start(self) -> None:
        """Refuse what cannot be had, and put the first choice into the queue.

        Raises:
            HeadInferError: none of it is had.
        """
        for ask in {ask.ids: ask for ask in self._asks}.values():
            await to_thread.run_sync(self._desk.check, ask)
        await self._submit(self._asks[0])

    async def _submit(self, ask: Ask) -> None:
        loop, queue = asyncio.get_running_loop(), asyncio.Queue[Event]()

        def on_event(event: Event) -> None:
            if isinstance(event, Ended):
                self._on_ended(event)
            with contextlib.suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(queue.put_nowait, event)

        self._queue = queue
        self._ticket = await to_thread.run_sync(self._desk.submit, ask, on_event)
        if self._gone:
            self._ticket.cancel()

    async def events(self, tick_s: float | None = None) -> AsyncIterator[tuple[int, Event | None]]:
        """Yield each event with the number of its choice, once `start` has returned.

        Args:
            tick_s: seconds without an event after which None is yielded; None for never.
        """
        try:
            for number, ask in enumerate(self._asks):
                if number:
                    await self._submit_again(ask)
                async for event in self._until_end(tick_s):
                    yield number, event
                    if isinstance(event, Ended) and event.finish_reason in ("cancelled", "error"):
                        return
        finally:
            self.cancel()

    async def _submit_again(self, ask: Ask) -> None:
        while True:
            try:
                return await self._submit(ask)
            except QueueFullError:
                await asyncio.sleep(_AGAIN_S)

    async def _until_end(self, tick_s: float | None) -> AsyncIterator[Event | None]:
        while True:
            try:
                event = await asyncio.wait_for(self._queue.get(), self._wait_s(tick_s))
            except (TimeoutError, asyncio.TimeoutError):
                if self._until is not None and not self._late and time.monotonic() > self._until:
                    self._late = True
                    self._cancel_ticket()
                if tick_s is not None:
                    yield None
                continue
            if not isinstance(event, Ended):
                yield event
                continue
            self._ticket = None
            late = self._late and event.finish_reason == "cancelled"
            yield replace(event, finish_reason="time") if late else event
            return

    def _wait_s(self, tick_s: float | None) -> float | None:
        """Return how long to wait for the next event."""
        if self._until is None or self._late:
            return tick_s
        left = max(self._until - time.monotonic(), 0) + 0.01
        return left if tick_s is None else min(left, tick_s)

    def cancel(self) -> None:
        """Stop what runs, as its client is gone; may be called again, and after the end."""
        self._gone = True
        self._cancel_ticket()

    def _cancel_ticket(self) -> None:
        if self._ticket is not None:
            self._ticket.cancel()
