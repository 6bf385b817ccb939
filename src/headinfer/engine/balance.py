"""The host's share of attention, corrected by when the host and the device finish."""

import contextlib
import statistics
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from headinfer.by_context import ByContext
from headinfer.engine.one_launch_share import (
    MOST_GROWTH,
    MOST_SHARE,
    OneLaunchShare,
    StepTimes,
)

_NOTES, _SETTLED_NOTES = 48, 256
"""Layers' attentions by which a share is judged: while it is sought, and once it is settled."""

_UNTRUE_NOTES = 48
"""Layers' attentions right after a change of the share that tell nothing of it.

What was fetched ahead is discarded, and times are known a step later than they were taken.
"""

_VALID_NOTES = 4096
"""Layers' attentions after which a settled share is sought again: the load of a machine changes."""

_FIRST_CUT, _MOST_CUT = 0.06, 0.25
"""Cuts of a share, as a share of it, while the device was never late. Each is 1.5 of the last."""

_LEAST_GROWTH = 0.02
"""Growth of a share, as a share of it, while the host was never late; `MOST_GROWTH` is the most."""

_CLOSE = 0.05
"""How far apart two shares are, as a share of them, of which one is as good as the other."""

_TOGETHER = 0.5
"""Lateness of the host, as a share of its time, below which both finish together.

A host that is late in each layer is late by all of its time, or nearly so.
"""


class _Note(NamedTuple):
    """A layer's attention, as `Balance.note` is told of it.

    Attributes:
        late: how late the host was, over its time.
        host_s: seconds that the host took.
        unasked: whether Python was the last of all.
    """

    late: float
    host_s: float
    unasked: bool


@dataclass(slots=True)
class Settled:
    """A share with which both finish together, as all caches share it that begin with it.

    Attributes:
        share: of the tokens that are not resident.
        host_s: seconds that the host takes for a layer's.
        valid_notes: layers' attentions, of any cache, after which it is sought again.
        assumed: whether it was not sought, as steps waited for Python.
        in_one_launch: what steps of one launch have in its place.
    """

    share: float
    host_s: float
    valid_notes: int = _VALID_NOTES
    assumed: bool = False
    in_one_launch: OneLaunchShare = field(init=False)

    def __post_init__(self) -> None:
        self.in_one_launch = OneLaunchShare(self.share, None if self.assumed else self.host_s)


class Balance:
    """A share of the tokens that are not resident: the host's, corrected by who finishes first.

    The host's time grows with its share, and the device's with the rest. Where the device is late,
    its lateness over the host's time says how far off the share is (a step of Newton's). Where the
    host is late, nothing says it: meanwhile the link fetches as many tiles as there are buffers. So
    the share is cut until the device is late. Then it is sought between the two, by halves.

    While steps wait for Python, the link fetches ahead, and the host is late with any share. A
    smaller one would leave the link more to do, and steps in one launch would take longer. So the
    share stays as it is until they no longer wait.

    A share with which both finish together stays, and of two close ones the larger. Beyond the best
    share a step grows with the time of the host's attention. Before it a step grows with the link's
    time, which is the slower one of both.

    Measured beside an H100, Llama-3-8B at 100K tokens, in pieces:

    - a share of 0.55: 54.3 ms a step, and both finish together
    - a share of 0.5: 58.7 ms, and the device is late
    - a share of 0.6: 57.1 ms, and the host is late by all of its time

    Only the thread that calls the engine may use it.

    Args:
        share: to begin with; what another cache has settled on is settled here, too.
        fixed: whether it stays.
        on_settled: called with each share that is found.

    Attributes:
        fixed: whether the share stays; then no notes are needed.
        one_launch: whether steps are to come in one launch, once the share is settled.
    """

    def __init__(
        self,
        share: float | Settled,
        *,
        fixed: bool,
        on_settled: Callable[[Settled], object] = lambda _settled: None,
    ) -> None:
        self.fixed = fixed
        self.one_launch = False
        self._on_settled = on_settled
        self._steady = False
        self._notes: list[_Note] = []
        self._untrue = _UNTRUE_NOTES  # notes to come that tell nothing
        self._settled: Settled | None = None
        self._past_changes = 0  # of shares that were sought anew
        self._seek()
        if isinstance(share, Settled):
            self._settled, share = share, share.share
        self._sought = share

    @property
    def share(self) -> float:
        """Share of the tokens as it is now."""
        if self.one_launch and self._settled is not None:
            return self._settled.in_one_launch.share
        return self._sought

    @property
    def settled(self) -> bool:
        """Whether the share in pieces changes seldom by now."""
        return self.fixed or self._settled is not None

    @property
    def judged(self) -> bool:
        """Whether also the share of steps in one launch does, where there are any."""
        if self.fixed or self._settled is None:
            return self.fixed
        return self._settled.in_one_launch.judged or not self.one_launch

    @contextlib.contextmanager
    def steady(self) -> Iterator[None]:
        """Take in nothing until the `with` statement ends, so that the share stays."""
        self._steady = True
        try:
            yield
        finally:
            self._steady = False

    def note(self, *, late_s: float, host_s: float, unasked: bool = False) -> None:
        """Take in a layer's attention.

        Args:
            late_s: seconds from when the device had done its part to when the host had; less than 0
                where the host was first.
            host_s: seconds that the host took.
            unasked: whether both had done it before Python asked for the next layer's.
        """
        if self._steady or self.fixed or host_s <= 0:
            return
        if self._untrue:
            self._untrue -= 1
            return
        if self._settled is not None:
            self._settled.valid_notes -= 1
            if self._settled.valid_notes <= 0:
                self._notes.clear()
                self._seek()
        self._notes.append(_Note(late_s / host_s, host_s, unasked))
        if len(self._notes) < (_SETTLED_NOTES if self._settled else _NOTES):
            return
        # Medians, for a step that was interrupted tells nothing.
        typical = _Note(*map(statistics.median_low, zip(*self._notes, strict=True)))
        self._notes.clear()
        if self._settled:
            self._watch(typical)
        elif typical.unasked:
            self._settle(typical.host_s, assumed=True)
        else:
            self._try_another(typical.late, typical.host_s)

    def note_step(self, times: StepTimes, new_tokens: int, tokens: int) -> None:
        """Take in a step of one launch; see `OneLaunchShare.note`."""
        if self._settled is not None and not self.judged:
            self._settled.in_one_launch.note(times, new_tokens, tokens)

    @property
    def changes(self) -> int:
        """How often the share in one launch was changed, also by having been sought anew."""
        settled = self._settled
        return self._past_changes + (0 if settled is None else settled.in_one_launch.changes)

    def _seek(self) -> None:
        """Begin to seek the share anew, from where it is."""
        if self._settled is not None:
            self._past_changes += self._settled.in_one_launch.changes + 1
        self._settled = None
        self._low: float | None = None  # the largest share with which the device was late
        self._high: float | None = None  # the smallest one with which the host was
        self._cut = _FIRST_CUT

    def _settle(self, host_s: float, *, assumed: bool = False) -> None:
        """Stay with the share there is, with which the host takes so long, or nearly so."""
        self._settled = Settled(self._sought, host_s, assumed=assumed)
        self._on_settled(self._settled)

    def _watch(self, typical: _Note) -> None:
        """Seek a settled share anew where the device is late, or an assumed one is too large."""
        assert self._settled is not None
        if typical.unasked:
            return
        host_late = self._settled.assumed and typical.late > _TOGETHER
        if typical.late < -_LEAST_GROWTH or host_late:
            self._seek()

    def _try_another(self, late: float, host_s: float) -> None:
        """Set the share by how late the host was with the one there is, over its time."""
        before = self._sought
        if 0 < late < _TOGETHER:
            self._settle(host_s)
            return
        if late > 0:
            self._high = before
            self._sought *= 1 - self._cut
            self._cut = min(1.5 * self._cut, _MOST_CUT)
        else:
            self._low = before
            growth = min(max(-late * (1 - before), _LEAST_GROWTH), MOST_GROWTH)
            self._sought = min(before * (1 + growth), MOST_SHARE)
        if self._low is not None and self._high is not None:
            self._sought = (self._low + self._high) / 2
            if self._high <= self._low * (1 + _CLOSE):
                self._sought = self._high
                self._settle(host_s)
        if self._low == self._sought == MOST_SHARE:
            self._settle(host_s)
        if self._sought != before:
            self._untrue = _UNTRUE_NOTES


class Balances:
    """A balance for each number of new tokens, or a few alike: more of them cost the host more.

    Each begins with what another cache has settled on near the same context.

    Args:
        share: what to begin with for a number of new tokens, where no other cache is known of.
        fixed: whether a share stays.
        kept: what caches of the same attachment have settled on.
        who: equal for the caches that attend alike.

    Attributes:
        tokens: that are attended now.
        fixed: whether a share stays.
    """

    def __init__(
        self,
        share: Callable[[int], float],
        *,
        fixed: bool,
        kept: ByContext[Settled],
        who: Hashable,
    ) -> None:
        self.tokens = 0
        self.fixed = fixed
        self._share, self._kept, self._who = share, kept, who
        self._balances: dict[int, Balance] = {}

    def at(self, new_tokens: int) -> Balance:
        """Return the balance of passes of so many new tokens."""
        alike = _alike(new_tokens)
        balance = self._balances.get(alike)
        if balance is None:
            who = self._who, alike
            begun = None if self.fixed else self._kept.find(who, self.tokens)
            balance = Balance(
                self._share(new_tokens) if begun is None else begun,
                fixed=self.fixed,
                on_settled=lambda settled: self._kept.keep(who, self.tokens, settled),
            )
            self._balances[alike] = balance
        return balance

    def share(self, new_tokens: int) -> float:
        """Return the share of passes of so many new tokens, also where none came yet."""
        balance = self._balances.get(_alike(new_tokens))
        return self._share(new_tokens) if balance is None else balance.share

    def settled(self, new_tokens: int) -> bool:
        """Return whether the share of passes of so many new tokens changes seldom by now."""
        balance = self._balances.get(_alike(new_tokens))
        return self.fixed if balance is None else balance.judged


def _alike(new_tokens: int) -> int:
    return (new_tokens - 1).bit_length()
