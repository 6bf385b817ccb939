"""Signals that ask to stop: Ctrl-C, SIGTERM, and SIGHUP of a terminal that is closed.

While an answer is generated the first asks to stop at the next good moment and the second stops at
once. Elsewhere each stops at once.
"""

import contextlib
import gc
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import TYPE_CHECKING, Any

from rich.console import Console

if TYPE_CHECKING:
    from headinfer.ranks.group import Ranks  # which imports torch

_Handler = Callable[[int, FrameType | None], None]

_SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP")
_WORDS = {"SIGTERM": "terminated", "SIGHUP": "hung up"}


class Stopped(KeyboardInterrupt):
    """A signal asked to stop.

    Args:
        number: of the signal.
    """

    def __init__(self, number: int = signal.SIGINT) -> None:
        super().__init__(number)
        self.number = number

    @property
    def by_hand(self) -> bool:
        """Whether it was Ctrl-C, which asks for the end of what is done and not of the process."""
        return self.number == signal.SIGINT


def stop_words(error: KeyboardInterrupt) -> str:
    """Return what a signal did, in a word or two."""
    return _WORDS.get(signal.Signals(_number(error)).name, "interrupted")


def stop_code(error: KeyboardInterrupt) -> int:
    """Return the exit code that shells have for a signal: 128 and its number."""
    return 128 + _number(error)


def _number(error: KeyboardInterrupt) -> int:
    return error.number if isinstance(error, Stopped) else int(signal.SIGINT)


@contextlib.contextmanager
def stopping_at_once() -> Iterator[None]:
    """Have SIGTERM and SIGHUP raise, as Ctrl-C does, inside the `with` statement.

    Raises:
        Stopped: one of them came.
    """

    def stop(number: int, _frame: FrameType | None) -> None:
        raise Stopped(number)

    with _handled(stop, "SIGTERM", "SIGHUP"):
        yield


class _Process:
    """A note of what this process is for.

    Attributes:
        runs_one_verb: whether it ends once its verb has: not where a test calls verbs.
    """

    runs_one_verb = False


def run_one_verb() -> None:
    """Say that this process ends once its verb has."""
    _Process.runs_one_verb = True


@contextlib.contextmanager
def ending_the_process() -> Iterator[None]:
    """Ignore signals that ask to stop once the `with` statement has ended, however it did.

    Then the process ends anyway, with a code that is settled. But torch's end takes a second or
    two. A signal in that time would add a traceback, or put another code in its place. Memory is
    the system's to take back, so that Python need not look for cycles in it. That took a second.
    """
    try:
        yield
    finally:
        if _Process.runs_one_verb:
            gc.freeze()
            for name in _SIGNALS:
                if hasattr(signal, name):  # Windows has no SIGHUP
                    signal.signal(getattr(signal, name), signal.SIG_IGN)


@contextlib.contextmanager
def _handled(handler: _Handler, *names: str) -> Iterator[None]:
    """Take signals over; those that the system lacks, and those that are ignored, stay as they are.

    SIGHUP is ignored under `nohup`, SIGINT in the background of a shell script. Python handles
    signals in the main thread alone.
    """
    before = {}
    if threading.current_thread() is threading.main_thread():
        for name in names:
            number = getattr(signal, name, None)  # Windows has no SIGHUP
            if number is not None and signal.getsignal(number) not in (signal.SIG_IGN, None):
                before[number] = signal.signal(number, handler)
    try:
        yield
    finally:
        for number, handler_before in before.items():
            signal.signal(number, handler_before)


class Interrupt:
    """A note of whether the user asked to stop.

    Args:
        console: on stderr.
        ranks: processes that compute the model, and stop together; None for this one alone.

    Attributes:
        requested: set by the first signal while `handling`.
        finishing: set once what was generated is being written: then only Ctrl-C still stops.
    """

    def __init__(self, console: Console, ranks: "Ranks | None" = None) -> None:
        self.requested = False
        self.finishing = False
        self._console = console
        self._ranks = ranks
        self._number: int = signal.SIGINT

    @property
    def error(self) -> Stopped:
        """What is raised for the signal that came first."""
        return Stopped(self._number)

    @contextlib.contextmanager
    def handling(self) -> Iterator[None]:
        """Take the signals over inside the `with` statement."""
        # Ranks must be gone at once when torchrun ends them, because one of them failed.
        names = _SIGNALS if self._ranks is None else ("SIGINT",)
        with _handled(self._on_signal, *names):
            yield

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        if self.finishing and number != signal.SIGINT:
            return  # whoever ends a session sends several signals, one after the other
        if self.requested or self.finishing:
            raise Stopped(self._number if self.requested else number)
        self.requested, self._number = True, number
        how = "; Ctrl-C again to stop at once" if number == signal.SIGINT else ""
        # The terminal may be gone, and the console amidst a line of its own.
        with contextlib.suppress(OSError, RuntimeError):
            self._console.print(f"stopping{how}")

    def check(self) -> None:
        """Raise if the user asked to stop; called between chunks of a prompt.

        Raises:
            Stopped: they did.
        """
        if self._asked():
            raise self.error

    def _asked(self) -> bool:
        """Whether the user asked any rank to stop."""
        if self._ranks is not None:
            self.requested = self._ranks.any(self.requested)
        return self.requested

    def stopping_criterion(self, input_ids: Any, _scores: Any, **_kwargs: Any) -> Any:
        """Tell `generate` to stop all rows if the user asked to; `[batch]` of bool."""
        import torch  # late, so that `--help` answers at once

        return input_ids.new_full((input_ids.shape[0],), self._asked(), dtype=torch.bool)
