"""Drafts: passes of one token that attend copies of some tokens, and are forgotten in the end.

What drafts write lies beside all that the ledgers count, but for windows. These are on the device
as a whole, so that drafts go on in them, and are taken back. Tiles of the next pass stay on their
way.
"""

from collections.abc import Sequence

from headinfer.engine.draft_copies import DraftCopies
from headinfer.engine.ending import uninterrupted
from headinfer.engine.ready import Form, Ready, ReadyStep, StepMemory
from headinfer.engine.ready_tokens import ReadyTokens
from headinfer.errors import CacheStateError
from headinfer.kv.extent import Extent
from headinfer.kv.ledger import Ledger
from headinfer.plan.memory import MOST_DRAFTED
from headinfer.units import counted


class DraftableTokens(ReadyTokens):
    """A cache's tokens, behind which others can be drafted, one at a time, and forgotten."""

    def _begin(self) -> None:
        super()._begin()
        self._draft_copies = DraftCopies(self._device, self._stats)
        self._draft_memory: StepMemory | None = None  # beside that of other steps, which stays
        self._draft_ready: list[Ready] = []

    @property
    def draft_obstacle(self) -> str | None:
        """Why nothing can be drafted, in a clause; None where it can, or sees windows alone."""
        if self.parked or self.closed:
            return "it has no GPU memory now"
        if self.plan.batch > 1:
            return f"it has {self.plan.batch} rows"
        if not self._full:
            return None
        if not self.plan.draft_tokens:
            return "its plan has no copies of tokens for drafts to attend"
        least, tokens = self.plan.draft_tokens + MOST_DRAFTED, self._full[0].tokens
        if tokens < least:
            return f"it has {counted(tokens, 'token')}, and drafts are worth it from {least} on"
        return None

    def begin_drafts(self) -> None:
        """Have all tokens that come be drafts, until `end_drafts`; `draft_obstacle` must be None.

        Raises:
            CacheStateError: the cache was closed, or a change of it was interrupted.
        """
        self.lengths()
        self.check_no_drafts()
        uninterrupted(lambda: self._draft_copies.fill(self._full))
        self._draft_ready = []
        self.drafting = True  # first: `end_drafts` undoes what follows
        for ledger in self._ledgers:
            ledger.firm_tokens = ledger.tokens

    def check_draft(self, batch: int, new_tokens: int) -> None:
        """Refuse a draft that there is no room for, before anything is done for it.

        Args:
            batch: rows.
            new_tokens: of each row.

        Raises:
            CacheStateError: not one token of the cache's one row, or there are too many drafts.
        """
        if (batch, new_tokens) != (1, 1):
            raise CacheStateError(
                f"a draft is one token of one row, and {new_tokens} of {batch} were given; leave "
                "drafting() first, or pass them one after the other"
            )
        for ledger in self._full:
            draft = ledger.draft
            if draft is not None and draft.tokens >= draft.capacity:
                raise CacheStateError(
                    f"{draft.drafted_tokens} tokens were drafted, which are all there is room for; "
                    "leave drafting(), pass them through the model, and draft again"
                )

    def end_drafts(self) -> None:
        """Forget what was drafted; may be called again."""
        if not self.drafting:
            return
        for ledger in self._ledgers:
            if ledger.draft is not None:
                ledger.draft.tokens = 0
            elif ledger.firm_tokens is not None:
                if ledger.tokens < ledger.firm_tokens:  # it was about to begin anew
                    self.half_done = True
                else:
                    ledger.crop(ledger.firm_tokens)
            ledger.firm_tokens = None
        self.drafting = False

    def begin_step(self, new_tokens: int = 1) -> ReadyStep | None:
        """Make ready for a step; see `ReadyTokens.begin_step`. A draft's is always one launch."""
        if not self.drafting:
            return super().begin_step(new_tokens)
        self._check_open()
        self._new_tokens = new_tokens
        extents = [self._draft_extent(ledger) for ledger in self._ledgers]
        if self._draft_memory is None:
            self._draft_memory = self._new_step_memory()
        self._draft_ready = [
            Ready(ledger, extent, ()) for ledger, extent in zip(self._ledgers, extents, strict=True)
        ]
        self._draft_memory.write(self._draft_ready)
        return ReadyStep(Form.ONE_LAUNCH, tuple(extent.piece for extent in extents))

    def _draft_extent(self, ledger: Ledger) -> Extent:
        """Return where a draft attends a track and is kept, with room for it."""
        if ledger.draft is None:
            return self._windows.window_with_room(ledger)
        return ledger.draft

    def _at_places(self) -> tuple[Sequence[Ready], StepMemory]:
        """Return the tracks that are ready for a captured step, and the memory that it reads."""
        if not self.drafting:
            return self._ready, self._memory()
        assert self._draft_memory is not None
        return self._draft_ready, self._draft_memory

    def _count_draft(self) -> None:
        """Count the token that a replay has drafted."""
        for ready in self._draft_ready:
            ready.ledger.extend(ready.extent, 1)

    def _forget_memory(self) -> None:
        """Forget what drafts read before the memory of tokens goes."""
        self._draft_ready = []
        self._draft_memory = None
        super()._forget_memory()


def draft_obstacle(parts: Sequence[DraftableTokens]) -> str | None:
    """Return why nothing can be drafted behind a cache's tokens, in a clause; None where it can.

    Args:
        parts: the cache's tokens on each device.
    """
    if not any(part._full for part in parts):
        return "its layers see windows alone"
    return next((each for part in parts if (each := part.draft_obstacle) is not None), None)
