"""The progress bar of prefill, and its honest guess of the time left."""

import time
from collections.abc import Callable
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from headinfer.units import counted


def seconds_left(points: list[tuple[int, float]], all_tokens: int) -> float | None:
    """Guess the seconds until all tokens are done.

    Each token attends to those before it, so the time after n tokens is taken to be `a n + b n^2`,
    fitted to all points by least squares. At 128K tokens the first tenth tells of a hundredth of
    the attention: an average speed would be off by several times.

    Args:
        points: tokens done and seconds since the start, ascending.
        all_tokens: where it ends.

    Returns:
        None without points.
    """
    if not points:
        return None
    scale = float(all_tokens)  # plain counts to the fourth power would lose digits
    done = points[-1][0] / scale
    shares = [(tokens / scale, seconds) for tokens, seconds in points]
    n2, n3, n4 = (sum(n**power for n, _ in shares) for power in (2, 3, 4))
    y1, y2 = (sum(n**power * seconds for n, seconds in shares) for power in (1, 2))
    linear, square = y1 / n2, 0.0
    determinant = n2 * n4 - n3 * n3
    if determinant > 1e-12 * n2 * n4:
        linear_fit, square_fit = (
            (y1 * n4 - y2 * n3) / determinant,
            (y2 * n2 - y1 * n3) / determinant,
        )
        if linear_fit < 0:
            linear, square = 0.0, y2 / n4
        elif square_fit > 0:
            linear, square = linear_fit, square_fit
    return linear * (1 - done) + square * (1 - done * done)


def format_duration(seconds: float) -> str:
    """Return a duration for people, such as "1:05"."""
    whole = round(seconds)
    minutes, rest = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class PrefillBar:
    """A bar that shows how far a prompt has come; a context manager around the call that runs it.

    Its `update` is the `progress` of `headinfer.attach`. Shows nothing where stderr is no terminal.

    Args:
        console: on stderr.
        all_tokens: of the prompt.
        after_update: called after each chunk but the last; may raise to stop.
        clock: for tests.
        transient: whether nothing is left of it once the prompt is read.
    """

    def __init__(
        self,
        console: Console,
        all_tokens: int,
        after_update: Callable[[], None],
        clock: Callable[[], float] = time.perf_counter,
        *,
        transient: bool = False,
    ) -> None:
        self._all_tokens = all_tokens
        self._after_update = after_update
        self._clock = clock
        self._started_s = clock()
        self._points: list[tuple[int, float]] = []
        self._progress = Progress(
            TextColumn("prefill"),
            BarColumn(bar_width=28),
            TextColumn("{task.fields[tokens]}"),
            TextColumn("{task.fields[speed]}"),
            TextColumn("[cyan]{task.fields[left]}"),
            console=console,
            transient=transient,
            disable=console.quiet or not console.is_terminal,
        )
        self._task = self._progress.add_task(
            "prefill", total=all_tokens, tokens=self._count(0), speed="", left=""
        )

    def _count(self, done_tokens: int) -> str:
        return f"{done_tokens:,} of {counted(self._all_tokens, 'token')}"

    @property
    def done(self) -> tuple[int, float]:
        """Tokens of the prompt that were run, and the seconds they took."""
        return self._points[-1] if self._points else (0, 0.0)

    def update(self, done_tokens: int, all_tokens: int) -> None:
        """Show the tokens done of a call; calls for other prompts than the bar's are ignored."""
        if all_tokens != self._all_tokens or self._progress.finished:
            return
        elapsed_s = self._clock() - self._started_s
        self._points.append((done_tokens, elapsed_s))
        left_s = seconds_left(self._points, all_tokens) or 0.0
        finished = done_tokens >= all_tokens
        speed = round(done_tokens / max(elapsed_s, 1e-9))
        self._progress.update(
            self._task,
            completed=done_tokens,
            tokens=self._count(done_tokens),
            speed=f"{counted(speed, 'token')}/s",
            left=f"in {format_duration(elapsed_s)}"
            if finished
            else f"{format_duration(left_s)} left",
        )
        if finished:
            self._progress.stop()  # before the first text comes
        else:
            self._after_update()

    def __enter__(self) -> "PrefillBar":
        """Show the bar."""
        self._started_s = self._clock()
        self._progress.start()
        return self

    def __exit__(
        self,
        _kind: type[BaseException] | None,
        _error: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None:
        """Leave the bar as it stands."""
        self._progress.stop()
