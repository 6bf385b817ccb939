"""What stderr shows of a run of several rows."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.status import Status as Spinner

from headinfer.cli.progress import format_duration
from headinfer.cli.text import wrapping_console


def run_console() -> Console:
    """Return a console on stderr that breaks lines, for tables."""
    return wrapping_console(stderr=True, highlight=True)


class RunProgress:
    """A spinner for what runs, with the time left, and a line for what is finished."""

    def __init__(self, console: Console, spinner: Spinner) -> None:
        self._console = console
        self._spinner = spinner
        self._started_s = time.monotonic()

    def started(self, what: str, left_s: float | None) -> None:
        """Show what runs; the time left is a guess from the trials so far."""
        self._started_s = time.monotonic()
        left = self.moved(what, left_s)
        if not self._console.is_terminal and left:
            self._say(f"{what}{left}")

    def moved(self, what: str, left_s: float | None) -> str:
        """Show how far it came, where there is a spinner; return the words for the time left."""
        left = "" if left_s is None else f", about {format_duration(left_s)} left"
        self._spinner.update(f"{what}{left}")
        return left

    def finished(self, what: str, outcome: str) -> None:
        """Print how it ended."""
        took = format_duration(time.monotonic() - self._started_s)
        self._say(f"{what}: {outcome} ({took} in all)")

    def _say(self, line: str) -> None:
        self._console.print(line, style="dim", markup=False, highlight=False, soft_wrap=True)


@contextmanager
def showing_progress(console: Console) -> Iterator[RunProgress]:
    """Show the spinner inside the `with` statement."""
    with console.status("") as spinner:
        yield RunProgress(console, spinner)
