"""Paces that answers have ended at, for the next ones of the same attachment to begin with.

What drafts and passes take is the machine's and the model's, and changes with the context alone.
So an answer measures it once, and others at about the same context need not.
"""

import functools
import threading
import weakref
from collections.abc import Hashable

from headinfer.generation.measured_pace import MeasuredPace
from headinfer.session import Session

_NEAR_DIVISOR, _NEAR_TOKENS = 5, 1024
"""How far apart two contexts are at the most that have about the same times: a fifth of the longer
one, or so many tokens. Below some thousand tokens weights are most of what a step reads."""

_MOST_KEPT = 16
"""Paces of one attachment."""


class KeptPaces:
    """A list of what answers measured, which any thread may use.

    Each is of one drafter and one context, where a step without drafts was timed last.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kept: list[tuple[Hashable, MeasuredPace]] = []  # the newest first

    def begin(self, drafter: Hashable, most: int, tried: int, tokens: int) -> MeasuredPace:
        """Return the pace of an answer, which is kept when the answer ends.

        Args:
            drafter: who drafts; equal for those that draft alike.
            most: drafts at the most.
            tried: drafts of each verification of a trial.
            tokens: of the prompt.
        """
        who = drafter, most, tried
        keep = functools.partial(self._keep, who)
        with self._lock:
            for other, pace in self._kept:
                if other == who and _are_near(pace.measured_tokens, tokens):
                    return pace.another(tokens, keep)
        return MeasuredPace(most, tried, keep)

    def _keep(self, who: Hashable, pace: MeasuredPace) -> None:
        """Keep the pace of an answer that has ended, for all that are near."""
        here = pace.measured_tokens
        if here is None:
            return
        with self._lock:
            others = [
                (other, kept)
                for other, kept in self._kept
                if other != who or not _are_near(kept.measured_tokens, here)
            ]
            self._kept = [(who, pace), *others][:_MOST_KEPT]


def _are_near(one: int | None, other: int) -> bool:
    """Whether passes take about the same with two numbers of tokens before them."""
    assert one is not None, "a pace that measured nothing is not kept"
    return abs(one - other) <= max(_NEAR_TOKENS, max(one, other) // _NEAR_DIVISOR)


_making = threading.Lock()
_paces: "weakref.WeakKeyDictionary[Session, KeptPaces]" = weakref.WeakKeyDictionary()


def paces_of(session: Session) -> KeptPaces:
    """Return the paces of an attachment."""
    with _making:
        return _paces.setdefault(session, KeptPaces())
