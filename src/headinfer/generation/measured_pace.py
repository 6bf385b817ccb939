"""How many tokens make a token cheapest, by what was measured so far.

Drafts cost time in any case, and what they save depends on how many are accepted. Both change with
the text and its length. So both are measured as an answer goes on, and where drafting does not pay
there is none. What one answer measured is where another one begins.
"""

import collections
import copy
import statistics
from collections.abc import Callable

from headinfer.generation.cheapest import number_to_try

_NUMBERS = (0, 1, 2, 3, 5, 7, 11, 15, 23, 31)
"""Drafts to choose from. A pass that comes again with as many tokens is captured, and few are."""

_REMEMBERED = 3
"""Times of one kind that a median is taken of: the newest, for a pass is faster once captured."""

_PLAIN_STEPS = 5
"""Steps without drafts at first: the first three of a cache may be launched to be captured."""

_LAUNCHED = 3
"""Passes of a number that a cache may launch before they are captured."""

_TRIALS = _LAUNCHED + 2
"""Verifications of a trial: those that are launched may have to compile, too."""

_PLAIN_AGAIN = 64
"""Verifications for each step without drafts that is to be timed again."""

_PAUSE, _LONGEST_PAUSE = 32, 1024
"""Steps before drafts are tried again where few were accepted: at first, and at the most."""

_FORGOTTEN = 0.9
"""Weight of acceptance that a verification leaves to what was before it."""

_MOST_REMEMBERED = 32
"""Drafts that acceptance is remembered of at the most. Many drafts that were right would otherwise
outweigh all the few that a verification tells of where most are wrong."""

_PRIOR_TRIED, _PRIOR_ACCEPTED = 2.0, 1.4
"""Drafts that are taken to have been tried and accepted before any was."""


class MeasuredPace:
    """A pace that follows acceptance and times.

    It begins with a few steps without drafts, then tries some. Where the times say that drafting
    cannot pay at all, it is tried again once the text is twice as long. Where too few are accepted,
    it is tried again after pauses that grow, as if nothing were known of acceptance. A number that
    is new is kept for as many verifications as a trial has: the first passes may be launched.

    Another answer may begin with what is known. Its cache launches the first passes of each number
    anew. Their times are left out where the number has times already.

    Args:
        most: to draft at the most.
        tried: drafts of each verification of a trial.
        on_end: called with the pace when the answer has ended.

    Attributes:
        measured_tokens: of prompt and answer, where a step without drafts was timed last; None
            before drafts were tried, too.
    """

    def __init__(
        self, most: int, tried: int, on_end: "Callable[[MeasuredPace], object] | None" = None
    ) -> None:
        self._numbers = [number for number in _NUMBERS if number <= most]
        self._now = 0
        self._first_tried = self._tried = min(tried, most)
        self._passes: dict[int, collections.deque[float]] = {}
        self._drafts: collections.deque[float] = collections.deque(maxlen=_REMEMBERED)
        self._accepted, self._tests = _PRIOR_ACCEPTED, _PRIOR_TRIED
        self._plain_due, self._trials_due = _PLAIN_STEPS, _TRIALS
        self._verified = 0  # since a step without drafts was timed
        self._pause = _PAUSE
        self._again_at = 0  # tokens
        self._on_end = on_end
        self._tokens = self._timed_at = 0  # now, and at the last time of a step without drafts
        self._judged = False  # whether times of all kinds are known
        self._from_before: frozenset[int] = frozenset()  # numbers that other answers have timed
        self._seen: collections.Counter[int] = collections.Counter()  # passes of this answer
        self._drafted = 0  # times in this answer

    def another(
        self, tokens: int, on_end: "Callable[[MeasuredPace], object] | None" = None
    ) -> "MeasuredPace":
        """Return a pace that begins with what this one knows, which stays as it is.

        Args:
            tokens: of the prompt.
            on_end: as for a new pace.
        """
        pace = copy.copy(self)
        pace._on_end = on_end
        pace._passes = {
            number: times.copy()
            for number, times in self._passes.items()
            if number in self._from_before or self._seen[number] >= _TRIALS
        }
        pace._from_before = frozenset(pace._passes)
        pace._drafts = self._drafts.copy()
        pace._seen, pace._drafted = collections.Counter(), 0
        if self._trials_due:  # what was begun begins anew
            pace._trials_due = _TRIALS
        if self._plain_due:
            pace._plain_due, pace._verified = 0, (1 + _LAUNCHED) * _PLAIN_AGAIN
        pause = min(max(self._again_at - self._tokens, 0), _LONGEST_PAUSE)
        pace._again_at, pace._tokens = tokens + pause, tokens
        return pace

    @property
    def measured_tokens(self) -> int | None:
        """Tokens at which a step without drafts was timed last; None while too little is known."""
        return self._timed_at if self._judged else None

    def number(self, tokens: int) -> int:
        """Return how many to draft next, with so many tokens of prompt and answer."""
        self._tokens = tokens
        if self._plain_due:
            return 0
        plain_steps = 1 + self._left_out(0)
        if self._verified >= _PLAIN_AGAIN * plain_steps:
            self._verified, self._plain_due = 0, plain_steps
            return 0
        if tokens < self._again_at:
            return 0
        if self._trials_due:
            return self._tried
        best = self._best(self._accepted / self._tests)
        self._now, self._judged = best, True
        if best:
            self._pause = _PAUSE
            if best not in self._passes:  # a pass of another length is not captured yet
                self._tried, self._trials_due = best, _TRIALS
            return best
        if self._best(1.0):
            self._again_at = tokens + self._pause
            self._pause = min(2 * self._pause, _LONGEST_PAUSE)
        else:
            self._again_at = 2 * tokens
        self._accepted, self._tests = _PRIOR_ACCEPTED, _PRIOR_TRIED
        self._tried, self._trials_due = self._first_tried, _TRIALS
        return 0

    def _best(self, acceptance: float) -> int:
        passes = {number: statistics.median_low(times) for number, times in self._passes.items()}
        draft_s = statistics.median_low(self._drafts)
        return number_to_try(draft_s, passes, acceptance, self._numbers, self._now)

    def note_draft(self, drafts: int, seconds: float) -> None:
        """Hear how long drafting took."""
        if not drafts:
            return
        self._drafted += 1
        if not self._from_before or self._drafted > _LAUNCHED:
            self._drafts.append(seconds / drafts)

    def note_pass(self, drafts: int, seconds: float) -> None:
        """Hear how long a pass took that verified so many drafts, or none."""
        if not self._left_out(drafts):
            times = self._passes.setdefault(drafts, collections.deque(maxlen=_REMEMBERED))
            times.append(seconds)
            self._timed_at = self._timed_at if drafts else self._tokens
        self._seen[drafts] += 1
        if drafts:
            self._verified += 1
            self._trials_due = max(self._trials_due - 1, 0)
        else:
            self._plain_due = max(self._plain_due - 1, 0)

    def note_accepted(self, accepted: int, *, rejected: bool) -> None:
        """Hear how many drafts were accepted, and whether one was rejected behind them."""
        weight = min(_FORGOTTEN, _MOST_REMEMBERED / self._tests)
        self._accepted = weight * self._accepted + accepted
        self._tests = weight * self._tests + accepted + rejected

    def end(self) -> None:
        """Hear that the answer has ended, in whatever way."""
        if self._on_end is not None:
            self._on_end(self)

    def _left_out(self, drafts: int) -> int:
        """Return how many of the next passes of a number are not timed: those of a new cache."""
        return max(_LAUNCHED - self._seen[drafts], 0) if drafts in self._from_before else 0
