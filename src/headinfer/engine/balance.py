"""The host's share of attention, corrected by when the host and the device finish."""

import contextlib
import statistics
from collections.abc import Iterator

_FIRST_NOTES, _MOST_NOTES = 32, 256
"""Layers' attentions after which the host's share is judged: at first, and in the end. The number
doubles each time in between. A share to begin with may be far off, but a change of it discards what
was fetched ahead, so that changes must become rare."""

_LEAST_GROWTH, _MOST_GROWTH = 0.02, 0.3
"""Growth of the share, as a share of it: the least that is worth it, and the most at once."""

_FIRST_CUT, _LEAST_CUT, _MOST_CUT = 0.04, 0.01, 0.2
"""Cuts of the share, as a share of it. A cut is twice the one before until the host is in time. The
next time it is late, the first cut is half of what it was."""

_MOST_SHARE = 0.98
"""With all tokens the host would leave nothing to compare its time with."""


class Balance:
    """A share of the tokens that are not resident: the host's, corrected by who finishes first.

    The host's time grows with its share, and the device's with the rest. Where the device is late,
    its lateness over the host's time says how far off the share is (a step of Newton's). Where the
    host is late, nothing says it: meanwhile the link fetches as many tiles as there are buffers. So
    the share is cut until the device is late.

    Measured beside an H100, Llama-3-8B at 100K tokens: with a share of 0.5 the device was 0.3 ms
    late. With one of 0.6 the host was 1.4 ms late, which is all of its time.

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
        self._lateness: list[float] = []
        self._needed = _FIRST_NOTES
        self._cut = self._first_cut = _FIRST_CUT

    @property
    def settled(self) -> bool:
        """Whether the share changes seldom by now."""
        return self.fixed or self._needed == _MOST_NOTES

    @contextlib.contextmanager
    def steady(self) -> Iterator[None]:
        """Take in nothing until the `with` statement ends, so that the share stays."""
        self._steady = True
        try:
            yield
        finally:
            self._steady = False

    def note(self, *, late_s: float, host_s: float) -> None:
        """Take in a layer's attention.

        Args:
            late_s: seconds from when the device had done its part to when the host had; less than 0
                where the host was first.
            host_s: seconds that the host took.
        """
        if self._steady or self.fixed or host_s <= 0:
            return
        self._lateness.append(late_s / host_s)
        if len(self._lateness) < self._needed:
            return
        late = statistics.median(self._lateness)  # a step that was interrupted tells nothing
        self._lateness.clear()
        self._needed = min(2 * self._needed, _MOST_NOTES)
        if late > 0:
            self.share *= 1 - self._cut
            self._cut = min(2 * self._cut, _MOST_CUT)
            return
        if self._cut != self._first_cut:
            self._cut = self._first_cut = max(self._first_cut / 2, _LEAST_CUT)
        growth = min(-late * (1 - self.share), _MOST_GROWTH)
        if growth >= _LEAST_GROWTH:
            self.share = min(self.share * (1 + growth), _MOST_SHARE)
