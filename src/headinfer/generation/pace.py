"""How many tokens to draft: as many as make a token cheapest, by what was measured so far.

Drafts cost time in any case, and what they save depends on how many are accepted. Both change with
the text and its length. So both are measured as an answer goes on, and where drafting does not pay
there is none.
"""

import collections
import contextlib
import statistics
from collections.abc import Callable, Mapping
from typing import Literal, Protocol

from headinfer.errors import OptionError
from headinfer.generation.cheapest import number_to_try

Number = int | Literal["auto", "off"]
"""Tokens to draft at a time, as users say it."""

_LOOKUP = "prompt_lookup_num_tokens"

MOST_DRAFTED = 31
"""Drafts of one verification at the most: more new tokens in a pass count as a prompt."""

_NUMBERS = (0, 1, 2, 3, 5, 7, 11, 15, 23, 31)
"""Drafts to choose from. A pass that comes again with as many tokens is captured, and few are."""

_REMEMBERED = 3
"""Times of one kind that a median is taken of: the newest, for a pass is faster once captured."""

_PLAIN_STEPS = 5
"""Steps without drafts at first: the first three of a cache may be launched to be captured."""

_TRIALS = 5
"""Verifications of a trial: the first three may be launched, and may have to compile."""

_PLAIN_AGAIN = 64
"""Verifications after which a step without drafts is timed again."""

_PAUSE, _LONGEST_PAUSE = 32, 1024
"""Steps before drafts are tried again where few were accepted: at first, and at the most."""

_FORGOTTEN = 0.9
"""Weight of acceptance that a verification leaves to what was before it."""

_MOST_REMEMBERED = 32
"""Drafts that acceptance is remembered of at the most. Many drafts that were right would otherwise
outweigh all the few that a verification tells of where most are wrong."""

_PRIOR_TRIED, _PRIOR_ACCEPTED = 2.0, 1.4
"""Drafts that are taken to have been tried and accepted before any was."""


def check_number(given: object, name: str = "draft") -> Number:
    """Return how many tokens to draft.

    Args:
        given: "auto", "off", or a number, which may be text.
        name: of the option, for the message.

    Raises:
        OptionError: it is none of these.
    """
    if given == "auto" or given == "off":
        return given
    number = -1
    if isinstance(given, (int, str)) and not isinstance(given, bool):
        with contextlib.suppress(ValueError):
            number = int(given)
    if not 1 <= number <= MOST_DRAFTED:
        raise OptionError(
            f"{name} must be from 1 to {MOST_DRAFTED}, 'off' or 'auto', not {given!r}"
        )
    return number


def drafts_itself(
    number: Number | None,
    assistant: object,
    generation: Mapping[str, object],
    draft_tokens: object,
    spelled: Callable[[str], str] = str,
) -> bool:
    """Whether a user who says how many to draft, and not who does, means the model itself.

    Args:
        number: that was given; None where none was.
        assistant: that was given; None where none was.
        generation: settings of transformers that were given, by name.
        draft_tokens: tokens that drafts attend, parsed; None where none were given.
        spelled: returns an option's name as the user writes it.

    Raises:
        OptionError: what was given contradicts itself.
    """
    others = {"assistant": assistant, _LOOKUP: generation.get(_LOOKUP)}
    if number == "off":
        asked = {**others, "draft_tokens": draft_tokens or None}
        against = [name for name, value in asked.items() if value is not None]
        if against:
            raise OptionError(
                f"{spelled('draft')} off has nothing drafted, which {spelled(against[0])} is for; "
                "leave one of them out"
            )
    if all(value is not None for value in others.values()):
        raise OptionError(
            f"{spelled('assistant')} and {spelled(_LOOKUP)} both draft; leave one of them out"
        )
    drafter = next((name for name, value in others.items() if value is not None), None)
    if drafter is not None and draft_tokens:
        raise OptionError(
            f"{spelled('draft_tokens')} {draft_tokens} takes memory for drafts of the model "
            f"itself, and {spelled(drafter)} drafts; leave one of them out"
        )
    itself = number not in (None, "off") and drafter is None
    if itself and draft_tokens == 0:
        raise OptionError(
            f"{spelled('draft')} {number} has the model draft itself, and "
            f"{spelled('draft_tokens')} 0 leaves its drafts nothing to attend; leave one of them "
            f"out, or give {spelled('assistant')}"
        )
    return itself


class Pace(Protocol):
    """A rule of how many tokens to draft, told how it went."""

    def number(self, tokens: int) -> int:
        """Return how many to draft next, with so many tokens of prompt and answer."""

    def note_draft(self, drafts: int, seconds: float) -> None:
        """Hear how long drafting took."""

    def note_pass(self, drafts: int, seconds: float) -> None:
        """Hear how long a pass took that verified so many drafts, or none."""

    def note_accepted(self, accepted: int, *, rejected: bool) -> None:
        """Hear how many drafts were accepted, and whether one was rejected behind them."""


class FixedPace:
    """A pace that never changes.

    Args:
        drafts: to make each time.
    """

    def __init__(self, drafts: int) -> None:
        self._drafts = drafts

    def number(self, tokens: int) -> int:
        """Return the number."""
        return self._drafts

    def note_draft(self, drafts: int, seconds: float) -> None:
        """Do nothing."""

    def note_pass(self, drafts: int, seconds: float) -> None:
        """Do nothing."""

    def note_accepted(self, accepted: int, *, rejected: bool) -> None:
        """Do nothing."""


class MeasuredPace:
    """A pace that follows acceptance and times.

    It begins with a few steps without drafts, then tries some. Where the times say that drafting
    cannot pay at all, it is tried again once the text is twice as long. Where too few are accepted,
    it is tried again after pauses that grow, as if nothing were known of acceptance. A number that
    is new is kept for as many verifications as a trial has: the first passes may be launched.

    Args:
        most: to draft at the most.
        tried: drafts of each verification of a trial.
    """

    def __init__(self, most: int, tried: int) -> None:
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

    def number(self, tokens: int) -> int:
        """Return how many to draft next, with so many tokens of prompt and answer."""
        if self._plain_due:
            return 0
        if self._verified >= _PLAIN_AGAIN:
            self._verified, self._plain_due = 0, 1
            return 0
        if tokens < self._again_at:
            return 0
        if self._trials_due:
            return self._tried
        best = self._best(self._accepted / self._tests)
        self._now = best
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
        if drafts:
            self._drafts.append(seconds / drafts)

    def note_pass(self, drafts: int, seconds: float) -> None:
        """Hear how long a pass took that verified so many drafts, or none."""
        times = self._passes.setdefault(drafts, collections.deque(maxlen=_REMEMBERED))
        times.append(seconds)
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
