"""Caches behind whose tokens others are drafted, by calls that are forgotten in the end."""

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

from headinfer.engine.drafting import draft_obstacle
from headinfer.engine.ending import uninterrupted
from headinfer.engine.parted import CacheEngine
from headinfer.errors import CacheStateError
from headinfer.integration.layer import OffloadedLayer
from headinfer.integration.parkable import ParkableCache


class DraftableCache(ParkableCache):
    """A cache behind whose tokens others can be drafted; see `OffloadedCache`.

    Attributes:
        verifies: whether calls of several tokens are said to verify drafts.
    """

    def __init__(self, config: Any) -> None:
        super().__init__(config=config)
        self._drafter: int | None = None  # the thread that drafts
        self._drafts_ended = threading.Event()
        self.verifies = False

    @property
    def can_draft(self) -> str | None:
        """Why nothing can be drafted behind its tokens now, in a clause; None where it can.

        Raises:
            CacheStateError: the cache was closed.
        """
        self.state.check_open()
        engine = self.state.engine
        if not all(isinstance(layer, OffloadedLayer) for layer in self.layers):
            return "its recurrent states cannot go back"
        if self.state.host.ranks.size > 1:
            return "its model is computed by several processes"
        if engine is None or not self.get_seq_length():
            return "it has no tokens"
        return draft_obstacle(engine.parts)

    @contextlib.contextmanager
    def drafting(self) -> Iterator[None]:
        """Have calls of the model with this cache draft, in the `with` statement.

        Each call passes one token, which attends some of the cache's tokens, in copies in GPU
        memory, and the drafts before it. At the end all drafts are forgotten: the cache is as
        before. Until then it cannot be read or changed otherwise.

        Raises:
            CacheStateError: nothing can be drafted, or the last call was interrupted.
        """
        reason = self.can_draft
        if reason is not None:
            raise CacheStateError(f"nothing can be drafted behind this cache's tokens: {reason}")
        self.check_whole()
        engine = self.state.engine
        assert engine is not None
        engine.check_no_drafts()
        try:
            self.turns.run(self._begin_drafts, engine)
            yield
        finally:
            uninterrupted(lambda: self.turns.run(self._end_drafts, engine))

    @contextlib.contextmanager
    def verifying(self) -> Iterator[None]:
        """Say that calls with this cache verify drafts, in the `with` statement.

        A call of 2 to 16 tokens is then captured and replayed, as steps of one token are. The
        model must not change between such calls, but by other parameters and buffers: these are
        noticed. What changes otherwise, as an adapter that is switched, is seen after any other
        call.
        """
        before, self.verifies = self.verifies, True
        try:
            yield
        finally:
            self.verifies = before

    def _begin_drafts(self, engine: CacheEngine) -> None:
        self._drafter = threading.get_ident()
        self._drafts_ended.clear()
        engine.begin_drafts()

    def _end_drafts(self, engine: CacheEngine) -> None:
        if engine.drafting:
            engine.end_drafts()
            self.lengths_before = None  # of a draft that was interrupted
        self._drafts_ended.set()

    def fork(self) -> Any:
        """Return a second cache; see `ParkableCache.fork`. Waits until another thread's drafts end.

        Raises:
            CacheStateError: it was closed, the model was detached, or a call was interrupted; or
                this thread drafts.
        """
        if self.turns.mine:  # nobody else could end theirs
            return super().fork()
        while (forked := self.turns.run(self._fork_or_wait)) is None:
            self._drafts_ended.wait()
        return forked

    def _fork_or_wait(self) -> Any:
        """Return a fork; None while another thread drafts, which ends out of this turn."""
        if self.state.drafting and self._drafter != threading.get_ident():
            return None
        return super().fork()
