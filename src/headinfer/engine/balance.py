"""The host's share of attention, corrected by who finishes first: the host or the device."""

import contextlib
from collections.abc import Iterator

_FIRST_NOTES, _MOST_NOTES = 32, 256
"""Layers' attentions after which the host's share is judged: at first, and in the end. The number
doubles each time in between. A share to begin with may be far off, but a change of it discards what
was fetched ahead, so that changes must become rare."""

_LATE, _EARLY = 0.75, 0.25
_FIRST_STEP, _LAST_STEP = 0.2, 0.01
"""If the host was later than the device in more than the first share of them, its share shrinks by
a step. If it was later in less than the second, its share grows by one. Steps get shorter each time
they turn."""


class Balance:
    """A share of the tokens that are not resident: the host's, corrected by who finishes first.

    Only the thread that calls the engine may use it.

    Args:
        share: to begin with.
        fixed: whether it stays.

    Attributes:
        share: as it is now.
        fixed: whether the share stays; then no notes are needed.
    """

    def __init__(self, share: float, *, fixed: bool) -> None:
        self.share = share
        self.fixed = fixed
        self._steady = False
        self._notes = self._late = 0
        self._needed = _FIRST_NOTES
        self._step = _FIRST_STEP
        self._grew: bool | None = None

    @contextlib.contextmanager
    def steady(self) -> Iterator[None]:
        """Take in nothing until the `with` statement ends, so that the share stays."""
        self._steady = True
        try:
            yield
        finally:
            self._steady = False

    def note(self, *, host_was_late: bool) -> None:
        """Take in whether the device had finished its part of a layer before the host did."""
        if self._steady:
            return
        self._notes += 1
        self._late += host_was_late
        if self.fixed or self._notes < self._needed:
            return
        late = self._late / self._notes
        self._notes = self._late = 0
        self._needed = min(2 * self._needed, _MOST_NOTES)
        if _EARLY <= late <= _LATE:
            return
        grows = late < _EARLY
        if self._grew is not None and grows != self._grew:
            self._step = max(self._step / 2, _LAST_STEP)
        self._grew = grows
        self.share = (
            min(self.share / (1 - self._step), 1.0) if grows else (self.share * (1 - self._step))
        )
