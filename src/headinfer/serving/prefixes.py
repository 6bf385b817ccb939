"""Caches of requests before, kept for those that begin with the same tokens."""

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Sequence

import torch

from headinfer.engine.stats import Stats
from headinfer.errors import HeadInferError, MemoryPlanError
from headinfer.integration.cache import OffloadedCache
from headinfer.integration.memory_held import held_by, held_together
from headinfer.integration.token_history import common_prefix
from headinfer.serving.choosing import LOOK_S, Chooser
from headinfer.serving.kept import LEAST_TOKENS, Kept, Lent, as_ids
from headinfer.serving.prefix_folder import PrefixFolder
from headinfer.serving.sessions import Sessions
from headinfer.serving.shelf import Shelf
from headinfer.serving.slots import SlotState
from headinfer.session import Session

_logger = logging.getLogger(__name__)


class Prefixes:
    """A keeper of the caches that requests leave behind.

    A prompt takes the kept cache with the longest beginning in common. It takes it over where it
    goes on at its end, and else a fork, so that the cache stays as it is. Both share CPU memory.

    What yields, and to whom: kept prefixes hold no GPU memory. Their CPU memory is bounded, and the
    least recently used goes to the disk, or is dropped without a folder. It goes at once where a
    new request needs memory. Caches of running requests never yield CPU memory. Their resident
    tokens in GPU memory yield only where another request could not begin at all otherwise.

    Args:
        session: makes caches.
        kept_bytes: the most CPU memory of kept prefixes. What one of them shares with a running
            request counts, too.
        folder: of those on the disk; None for none. Where the plan rounds tokens it has sessions
            with names alone.
        grow_bytes: prefixes larger than this are saved while they are read, by so much at a time.
        folder_bytes: the most disk space that the folder may have; None for any.

    Attributes:
        sessions: those with names in the folder; None where there is none, or nothing is kept.
    """

    def __init__(
        self,
        session: Session,
        kept_bytes: int,
        folder: PrefixFolder | None,
        grow_bytes: int,
        folder_bytes: int | None = None,
    ) -> None:
        self._session = session
        self._lent: list[Lent] = []  # until they are kept; changed with the shelf's mutex
        self._reuses = session.goes_on_alike()
        self._goes_back = session.goes_back
        self._grow_bytes = grow_bytes
        folder = folder if self._reuses else None
        # An exact server finds prefixes by their ids alone, and would take rounded ones, too.
        shared = None if session.plan.rounds else folder
        self._shelf = Shelf(session, kept_bytes, shared, folder_bytes)
        self.sessions = None if folder is None else Sessions(session, self._shelf, folder)
        self._entering = threading.Lock()  # so that two do not count on the same memory
        self._changed = threading.Condition(self._shelf.mutex)
        self._chooser = Chooser(self._shelf, self._lent, self._changed, goes_back=self._goes_back)
        if not self._reuses:
            _logger.warning(
                "no prefixes are kept: this model gives other results for a prompt that is read in "
                "two calls"
            )

    def lend(
        self,
        ids: Sequence[int],
        new_tokens: int,
        marks: Sequence[int] = (),
        given_up: Callable[[], bool] = lambda: False,
    ) -> Lent:
        """Return a cache for a prompt, with as much of it as any cache holds.

        Waits for other requests to end where these have the CPU memory. Waits as well for those
        that are about to end, where they may leave more of the prompt.

        Args:
            ids: the prompt.
            new_tokens: the most tokens of the answer.
            marks: positions in the prompt at which others are likely to part from it.
            given_up: whether nobody waits any more, asked now and then.

        Raises:
            HeadInferError: the model was detached.
        """
        prompt, most = as_ids(ids), len(ids) + new_tokens
        lent = self._chooser.find(prompt, given_up) if self._reuses else None
        if lent is None:
            lent = Lent(cache=self._session.new_cache(), ids=prompt)
        cache, lent.given_up = lent.cache, given_up
        lent.read_tokens = lent.snapshot_tokens = lent.saved_tokens = lent.cached_tokens
        if not self._goes_back:
            parting = (*marks, *self._parting(prompt))
            lent.marks = frozenset(mark for mark in parting if 0 < mark < len(ids))
        cache.marks, cache.state.max_tokens, cache.stats = tuple(lent.marks), most, Stats()
        try:
            self._wait_for_room(lent, most, given_up)
        except BaseException:
            self._put_back(lent)
            raise
        return lent

    @property
    def _running(self) -> list[Lent]:
        """The caches of requests that have not ended."""
        return [each for each in self._lent if not each.ended]

    def _wait_for_room(self, lent: Lent, tokens: int, given_up: Callable[[], bool]) -> None:
        """Wait for CPU memory: kept prefixes yield it at once, and running requests at their end.

        What remains missing then is for the model's call to refuse.
        """
        while True:
            with self._entering:
                if given_up() or self._has_room(lent.cache, tokens):
                    with self._changed:
                        self._lent.append(lent)
                    return
            with self._changed:
                self._changed.wait(LOOK_S)

    def _has_room(self, cache: OffloadedCache, tokens: int) -> bool:
        """Have kept prefixes yield for a cache; return whether there is room, or none will come."""
        missing = self._session.missing_host_bytes
        with self._changed:
            running = self._running
            if self._session.disk.file and not all(each.begun for each in running):
                return False  # above a disk each takes all that is left
            promised = [missing(run.cache, run.cache.state.max_tokens or 0) for run in running]
        lacking = self._shelf.make_room(missing(cache, tokens) + sum(promised))
        return not (lacking and self._running)

    def _parting(self, prompt: torch.Tensor) -> list[int]:
        """Return where a kept prefix parts from a prompt: the next prompt may part there, too."""
        with self._shelf.mutex:
            common = max((common_prefix(each.ids, prompt) for each in self._shelf.kept), default=0)
        return [common] if common >= LEAST_TOKENS else []

    def note_progress(self, lent: Lent, read_tokens: int) -> None:
        """Hear how much of a prompt was read; in the model's call, with all layers alike."""
        lent.read_tokens = read_tokens
        if not self._reuses:
            return
        held = held_by(lent.cache)
        if not self._goes_back and lent.is_due(held.tokens):
            lent.snapshot_tokens = held.tokens
            lasting = held.tokens >= len(lent.ids) or held.tokens in lent.marks
            self._keep(lent.cache.fork(), lent, lasting=lasting)
        per_token = held.host_bytes // max(held.tokens, 1)
        if (held.tokens - lent.saved_tokens) * per_token > self._grow_bytes:
            lent.saved_tokens = held.tokens
            self._shelf.grow(lent, lent.cache.fork())

    def _keep(self, cache: OffloadedCache, lent: Lent, *, lasting: bool) -> None:
        known = cache.token_ids
        if known is None or known.shape[1] < LEAST_TOKENS:
            cache.close()
            return
        snapshot = cache is not lent.cache
        kept = Kept(
            ids=known[0],
            cache=cache,
            earliest_crop=cache.earliest_crop,
            lasting=lasting,
            snapshot=snapshot,
        )
        if not snapshot:
            lent.kept, kept.home, kept.id = kept, lent.home, lent.id
        holder = self._shelf.add(kept)
        if not snapshot:
            lent.slot_id = holder.id

    def give_back(self, lent: Lent, *, keep: bool) -> None:
        """Take a cache back from a request that has ended.

        Args:
            lent: with its cache.
            keep: whether what it holds is sound.
        """
        with self._changed:
            lent.ended = True
        try:
            if keep and self._reuses and lent.cache.state.engine is not None:
                lent.cache.progress = None
                lent.cache.park()
                with contextlib.suppress(MemoryPlanError):  # it is kept with what it has reserved
                    lent.cache.compact()
                self._keep(lent.cache, lent, lasting=True)
                return
        except HeadInferError as error:
            _logger.warning("what a request has read is not kept: %s", error)
        finally:
            with self._changed:
                self._lent.remove(lent)
                self._changed.notify_all()
        self._put_back(lent)

    def _put_back(self, lent: Lent) -> None:
        """Drop a cache; what the disk has of it stays there."""
        if lent.home is not None:
            lent.home.owned = False
        lent.cache.close()

    @property
    def uses_marks(self) -> bool:
        """Whether prompts may leave snapshots at marks."""
        return self._reuses and not self._goes_back

    @property
    def yielding_bytes(self) -> int:
        """CPU memory of what is kept, and of running requests; what they share counts once."""
        with self._shelf.mutex:
            caches = [each.cache for each in self._shelf.kept]
            caches += [each.cache for each in self._running]
        return held_together(caches)

    def states(self) -> list[SlotState]:
        """Return what is kept, without waiting for anything."""
        return self._shelf.states()

    def close(self, timeout_s: float) -> None:
        """Save what is kept where there is a folder, the newest first, and drop all caches."""
        self._shelf.close(time.monotonic() + timeout_s)
