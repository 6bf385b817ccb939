"""Turns at one attached model: its threads go one after the other, first come first served.

Caches of one model share the device's streams and the attention functions, so only one thread may
be inside at a time. A turn lasts for one call of the model, never for a whole `generate`. A call in
chunks lets others have their turns between two of them.
"""

import functools
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar, cast

import torch

from headinfer.engine.ending import uninterrupted

_Parameters = ParamSpec("_Parameters")
_Result = TypeVar("_Result")


class _Waits(threading.local):
    """A count of the seconds for which each thread had no turn and wanted one."""

    seconds = 0.0


_waits = _Waits()


def waited_s() -> float:
    """Return the seconds that the calling thread has waited for turns so far, at any model.

    Who times what a thread does takes them off: they are the work of other threads.
    """
    return _waits.seconds


def _wait(gate: threading.Lock) -> None:
    """Acquire a lock, and count how long that took, also where it is interrupted."""
    began_s = time.perf_counter()
    try:
        gate.acquire()
    finally:
        _waits.seconds += time.perf_counter() - began_s


class _Turn:
    """A thread's wish to be inside, waiting or granted."""

    __slots__ = ("gate", "thread")

    def __init__(self) -> None:
        self.thread = threading.get_ident()
        self.gate = threading.Lock()
        self.gate.acquire()


class Turns:
    """A fair lock: threads get their turn in the order in which they asked for it.

    A plain lock would not do: the thread that gives it up is mostly the one that gets it back. A
    thread that has the turn already may ask again. One that waits can be interrupted, and whatever
    ends a turn, an exception at any place included, hands it on.
    """

    def __init__(self) -> None:
        # Reentrant, because the garbage collector may call `retire` within.
        self._mutex = threading.RLock()
        self._current: _Turn | None = None
        self._waiting: deque[_Turn] = deque()
        self._retired: list[list[Any]] = []

    @property
    def mine(self) -> bool:
        """Whether the calling thread has the turn."""
        current = self._current
        return current is not None and current.thread == threading.get_ident()

    def run(
        self,
        function: Callable[_Parameters, _Result],
        /,
        *args: _Parameters.args,
        **kwargs: _Parameters.kwargs,
    ) -> _Result:
        """Call a function in a turn, after waiting for it; at once in a turn the thread has."""
        if self.mine:
            return function(*args, **kwargs)
        turn = _Turn()
        try:
            self._take(turn)
            return function(*args, **kwargs)
        finally:
            try:
                self._leave(turn)
            except BaseException:  # Ctrl-C comes between any two instructions, here too
                self._leave(turn)
                raise

    def awaited(self) -> bool:
        """Whether threads wait for their turn."""
        return bool(self._waiting)

    def pass_on(self, pause_s: float = 0.0) -> None:
        """Let those that wait have their turns now, and go on after them.

        To be called in a turn, where others find all as between two calls. An interrupt is heard
        once the thread has its turn again, because what it unwinds must not meet theirs.

        Args:
            pause_s: seconds to stay away where nobody waits, for one that is about to ask.
        """
        turn, left, paused = self._current, False, False
        if turn is None or not self.mine or not (self.awaited() or pause_s):
            return

        def pass_it() -> None:  # called again where it was interrupted
            nonlocal left, paused
            with self._mutex:
                if not left:
                    self._leave(turn)
                left, alone = True, self._current is None
            if alone and not paused:
                paused = True
                time.sleep(pause_s)
            with self._mutex:
                if self._current is None:
                    self._current = turn
                elif self._current is not turn and turn not in self._waiting:
                    self._waiting.append(turn)
            while self._current is not turn:
                _wait(turn.gate)

        uninterrupted(pass_it)

    def retire(self, things: list[Any]) -> None:
        """Let things die in a turn, without waiting: now if nobody else is inside.

        Args:
            things: what must not die beside another thread's call; emptied, now or then.
        """
        with self._mutex:
            if self._current is None or self.mine:
                things.clear()
            else:
                self._retired.append(things)

    def _take(self, turn: _Turn) -> None:
        with self._mutex:
            if self._current is None:
                self._current = turn
                return
            self._waiting.append(turn)
        _wait(turn.gate)

    def _leave(self, turn: _Turn) -> None:
        """Stop waiting, or hand on; may be interrupted anywhere and is then called again."""
        with self._mutex:
            if turn in self._waiting:
                self._waiting.remove(turn)
            if self._current is turn:
                while self._retired:
                    self._retired.pop().clear()
                self._current = None
            if self._current is None and self._waiting:
                self._current = self._waiting[0]
            if self._waiting and self._waiting[0] is self._current:
                if self._current.gate.locked():
                    self._current.gate.release()
                self._waiting.popleft()


class TakesTurns(Protocol):
    """An object that knows the turns of its attachment."""

    @property
    def turns(self) -> Turns:
        """The turns."""


_Self = TypeVar("_Self", bound=TakesTurns)


def in_turn(
    method: Callable[Concatenate[_Self, _Parameters], _Result],
) -> Callable[Concatenate[_Self, _Parameters], _Result]:
    """Have a method run in a turn of its object's attachment, out of torch.compile's reach."""

    @functools.wraps(method)
    def run(self: _Self, /, *args: _Parameters.args, **kwargs: _Parameters.kwargs) -> _Result:
        if self.turns.mine:  # without the frame of `Turns.run`: asked several times a layer
            return method(self, *args, **kwargs)
        return self.turns.run(method, self, *args, **kwargs)

    return cast(
        "Callable[Concatenate[_Self, _Parameters], _Result]",
        torch.compiler.disable(run),
    )
