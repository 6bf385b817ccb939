"""What stderr shows of work that takes its time before the first text: what it is, and how long."""

import threading
from types import TracebackType

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

_QUIET_S = 5.0
"""Seconds after which a line is printed where nothing can be drawn anew."""

LOADING_S = 30.0
"""The same for what takes some seconds anyway, as importing torch."""


class Stages:
    """A line for what is being done, and the time since it began; a context manager.

    Where stderr is no terminal, each stage that takes more than a few seconds prints one line.

    Args:
        console: on stderr.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._shown = console.is_terminal and not console.quiet
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            TimeElapsedColumn(),
            console=console,
            transient=True,
            disable=not self._shown,
        )
        self._timer: threading.Timer | None = None

    def begin(self, what: str, *, quiet_s: float = _QUIET_S) -> None:
        """Show the next stage in place of the last one.

        Args:
            what: is done, as in "reading the prompt".
            quiet_s: how long it may go unmentioned where nothing can be drawn anew.
        """
        self._end()
        if self._shown:
            self._progress.add_task(what, total=None)
        else:
            self._timer = threading.Timer(quiet_s, self._say, (what,))
            self._timer.daemon = True
            self._timer.start()

    def _say(self, what: str) -> None:
        self._console.print(f"{what} ...", markup=False)

    def _end(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        for task in self._progress.task_ids:
            self._progress.remove_task(task)

    def __enter__(self) -> "Stages":
        """Begin to show stages."""
        self._progress.start()
        return self

    def __exit__(
        self,
        _kind: type[BaseException] | None,
        _error: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None:
        """Show no more of them."""
        self._end()
        self._progress.stop()
