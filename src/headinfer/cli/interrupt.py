"""Ctrl-C: the first press asks to stop at the next good moment, the second stops at once."""

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType
from typing import Any

from rich.console import Console


class Interrupt:
    """Whether the user asked to stop.

    Attributes:
        requested: set by the first Ctrl-C while `handling`.
    """

    def __init__(self, console: Console) -> None:
        self.requested = False
        self._console = console

    @contextlib.contextmanager
    def handling(self) -> Iterator[None]:
        """Take SIGINT over inside the `with` statement. Main thread only."""
        before = signal.signal(signal.SIGINT, self._on_signal)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    def _on_signal(self, _number: int, _frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        self._console.print("stopping; Ctrl-C again to stop at once")

    def check(self) -> None:
        """Raise if the user asked to stop; called between chunks of a prompt.

        Raises:
            KeyboardInterrupt: they did.
        """
        if self.requested:
            raise KeyboardInterrupt

    def stopping_criterion(self, input_ids: Any, _scores: Any, **_kwargs: Any) -> Any:
        """Tell `generate` to stop all rows if the user asked to; `[batch]` of bool."""
        import torch  # late, so that `--help` answers at once

        return input_ids.new_full((input_ids.shape[0],), self.requested, dtype=torch.bool)
