"""How many tokens to draft: what users say of it, and what is asked before each verification."""

import contextlib
from collections.abc import Callable, Mapping
from typing import Literal, Protocol

from headinfer.errors import OptionError

Number = int | Literal["auto", "off"]
"""Tokens to draft at a time, as users say it."""

_LOOKUP = "prompt_lookup_num_tokens"

MOST_DRAFTED = 31
"""Drafts of one verification at the most: more new tokens in a pass count as a prompt."""


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

    def end(self) -> None:
        """Hear that the answer has ended, in whatever way."""


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

    def end(self) -> None:
        """Do nothing."""
