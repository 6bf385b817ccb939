"""Paces that answers have ended at, for the next ones of the same attachment to begin with."""

import functools
import threading
import weakref
from collections.abc import Hashable

from headinfer.by_context import ByContext
from headinfer.generation.measured_pace import MeasuredPace
from headinfer.session import Session


class KeptPaces:
    """A list of what answers measured, which any thread may use.

    Each is of one drafter and one context, where a step without drafts was timed last.
    """

    def __init__(self) -> None:
        self._paces: ByContext[MeasuredPace] = ByContext()

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
        before = self._paces.find(who, tokens)
        return MeasuredPace(most, tried, keep) if before is None else before.another(tokens, keep)

    def _keep(self, who: Hashable, pace: MeasuredPace) -> None:
        """Keep the pace of an answer that has ended, for all that are near."""
        if pace.measured_tokens is not None:
            self._paces.keep(who, pace.measured_tokens, pace)


_making = threading.Lock()
_paces: "weakref.WeakKeyDictionary[Session, KeptPaces]" = weakref.WeakKeyDictionary()


def paces_of(session: Session) -> KeptPaces:
    """Return the paces of an attachment."""
    with _making:
        return _paces.setdefault(session, KeptPaces())
