"""The shelf that prefixes are kept on: bounded in memory, the least recently used on the disk."""

import logging
import queue
import threading
import time
from collections.abc import Callable

from headinfer.integration.cache import OffloadedCache
from headinfer.integration.memory_held import held_by, held_together
from headinfer.integration.token_history import common_prefix
from headinfer.serving.kept import Kept, Lent, begins_with, next_tick
from headinfer.serving.prefix_folder import PrefixFolder, SavedPrefix
from headinfer.serving.slots import SlotState
from headinfer.session import Session

_logger = logging.getLogger(__name__)

_COVERED_DIVISOR = 64
"""A prefix is not worth a place on the disk if another one has all but one in so many tokens."""


class Shelf:
    """A shelf of kept prefixes, with a thread of its own that tidies it.

    Args:
        session: the attachment.
        kept_bytes: the most CPU memory.
        folder: where the others go; None to drop them.
        folder_bytes: the most disk space that the folder may have; None for any.

    Attributes:
        mutex: held while the lists are looked at or changed, and never while a turn is awaited.
        kept: those in memory.
        saved: those on the disk, also of caches that go on from there.
    """

    def __init__(
        self,
        session: Session,
        kept_bytes: int,
        folder: PrefixFolder | None,
        folder_bytes: int | None = None,
    ) -> None:
        self.mutex = threading.Lock()
        self.kept: list[Kept] = []
        self.saved: list[SavedPrefix] = [] if folder is None else folder.found()
        for saved in self.saved:
            saved.used = next_tick()
        self._session = session
        self._kept_bytes = kept_bytes
        self._folder = folder
        self._folder_bytes = folder_bytes
        self._goes_back = session.goes_back
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="headinfer-prefixes", daemon=True)
        self._make_disk_room(0)
        self._thread.start()

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            try:
                job()
            except Exception:
                _logger.exception("kept prefixes could not be tidied")

    def add(self, kept: Kept) -> Kept:
        """Keep one more, and return what has its tokens now; what is needless goes."""
        kept.used = next_tick()
        with self.mutex:
            covering = [each for each in self.kept if each.covers(kept)]
            needless = [each for each in self.kept if not each.busy and kept.covers(each)]
            if covering:
                covering[0].used, needless = kept.used, [kept]
            else:
                self.kept = [*(each for each in self.kept if each not in needless), kept]
        for each in needless:
            self._drop(each)
        self._jobs.put(self._tidy)
        return covering[0] if covering else kept

    def _drop(self, kept: Kept) -> None:
        """Close a cache that is off the shelf; what the disk has of it stays there."""
        if kept.home is not None:
            kept.home.owned = False
        kept.cache.close()

    def load(self, saved: SavedPrefix) -> OffloadedCache | None:
        """Return a cache with what the disk has; one that gives nothing is not listed any more."""
        assert self._folder is not None
        self.make_room(self._session.host_bytes_for(len(saved.ids)))
        cache = self._folder.load(saved)
        if cache is None:
            self.unlist(saved)
        return cache

    def unlist(self, saved: SavedPrefix) -> None:
        """Do not look at what the disk has any more; it stays there."""
        with self.mutex:
            if saved in self.saved:
                self.saved.remove(saved)

    def grow(self, lent: Lent, fork: OffloadedCache) -> None:
        """Save what a request has read so far, in the background, where there is a folder."""
        if self._folder is None:
            fork.close()
            return

        def save() -> None:
            assert self._folder is not None
            saved = None
            if self._make_disk_room(held_by(fork).host_bytes, lent.home):
                saved = self._folder.save(fork, lent.home, lent.id)
            fork.close()
            if saved is not None:
                self._list(saved)
                lent.home = saved
                if lent.kept is not None and lent.kept.home is None:
                    lent.kept.home = saved

        self._jobs.put(save)

    def make_room(self, needed_bytes: int) -> bool:
        """Have the least recently used prefixes yield as long as a request lacks CPU memory.

        Returns:
            Whether it lacks some still, and nothing is left to yield.
        """
        plan = self._session.plan
        working_bytes = plan.arena_bytes + plan.activation_bytes
        while needed_bytes > self._session.host_room(working_bytes).kv_bytes:
            if not self._evict_one():
                return True
        return False

    @property
    def kept_bytes(self) -> int:
        """CPU memory of what is kept; what several share counts once."""
        return held_together([each.cache for each in self.kept])

    def _tidy(self) -> None:
        while self.kept_bytes > self._kept_bytes and self._evict_one():
            pass

    def _evict_one(self) -> bool:
        """Have the least recently used prefix yield; return whether there was one."""
        with self.mutex:
            idle = [each for each in self.kept if not each.busy]
            if not idle:
                return False
            victim = min(idle, key=lambda each: each.used)
            victim.busy += 1
        try:
            self._save(victim)
        finally:
            with self.mutex:
                victim.busy -= 1
                gone = not victim.busy
                if gone:
                    self.kept.remove(victim)
        if gone:
            self._drop(victim)
        return True

    def _save(self, kept: Kept) -> None:
        """Have the disk hold a prefix, where that is worth it."""
        if self._folder is None or kept.is_saved:
            return
        if not self._is_worth_saving(kept):
            kept.lasting = False  # or two that have nearly all of each other would both go unsaved
            return
        if not self._make_disk_room(held_by(kept.cache).host_bytes, kept.home):
            _logger.warning("a prefix of %d tokens is not saved: no room", len(kept.ids))
            return
        saved = self._folder.save(kept.cache, kept.home, kept.id)
        if saved is not None:
            kept.home = saved
            saved.used = kept.used
            self._list(saved)

    def _make_disk_room(self, needed_bytes: int, home: SavedPrefix | None = None) -> bool:
        """Remove the least recently used prefixes from a folder of bounded size.

        Sessions with names stay, and so do those that caches in memory go on from.

        Args:
            needed_bytes: of what is to be saved.
            home: has the first of it, and is replaced.

        Returns:
            Whether there is room.
        """
        if self._folder is None or self._folder_bytes is None:
            return True
        spared = 0 if home is None else home.num_bytes
        more_bytes = max(needed_bytes - spared, 0)
        with self.mutex:
            removable_bytes = sum(each.num_bytes for each in self._removable())
        if self._folder.num_bytes + more_bytes - removable_bytes > self._folder_bytes:
            return False
        while self._folder.num_bytes + more_bytes > self._folder_bytes:
            with self.mutex:
                free = self._removable()
                if not free:
                    return False
                oldest = min(free, key=lambda each: each.used)
                self.saved.remove(oldest)
            self._folder.remove(oldest)
        return True

    def _removable(self) -> list[SavedPrefix]:
        """Return what may be removed from the folder; the mutex must be held."""
        return [each for each in self.saved if not (each.owned or each.named)]

    def _is_worth_saving(self, kept: Kept) -> bool:
        if not kept.lasting:
            return False
        with self.mutex:
            others = [each.ids for each in self.kept if each is not kept and each.lasting]
            others += [each.ids for each in self.saved if each is not kept.home]
        tokens = len(kept.ids)
        enough = tokens - tokens // _COVERED_DIVISOR if self._goes_back else tokens
        return not any(
            common_prefix(ids, kept.ids) >= enough and (self._goes_back or len(ids) == tokens)
            for ids in others
        )

    def _list(self, saved: SavedPrefix) -> None:
        """List what was saved, and remove from the disk what it has, too."""
        with self.mutex:
            if saved not in self.saved:
                self.saved.append(saved)
            needless = [
                each
                for each in self.saved
                if not (each is saved or each.owned or each.named) and self._replaces(saved, each)
            ]
            self.saved = [each for each in self.saved if each not in needless]
        for each in needless:
            assert self._folder is not None
            self._folder.remove(each)

    def _replaces(self, saved: SavedPrefix, other: SavedPrefix) -> bool:
        alike = self._goes_back or len(saved.ids) == len(other.ids)
        return alike and begins_with(saved.ids, other.ids)

    def note_named(self, saved: SavedPrefix) -> None:
        """List a session that a user gave a name, in place of what had it before."""
        if self._folder is None:
            return
        saved.used = next_tick()
        with self.mutex:
            self.saved = [each for each in self.saved if each.path != saved.path]
            self.saved.append(saved)

    def states(self) -> list[SlotState]:
        """Return what is kept, in memory and on the disk, without waiting for anything."""
        with self.mutex:
            kept, saved = list(self.kept), list(self.saved)
        states = []
        for each in kept:
            held = held_by(each.cache)
            states.append(
                SlotState(
                    id=each.id,
                    state="kept",
                    tokens=held.tokens,
                    device_bytes=held.device_bytes,
                    host_bytes=held.host_bytes,
                    disk_bytes=each.home.num_bytes if each.home is not None else 0,
                )
            )
        homes = [each.home for each in kept]
        states += [
            SlotState(id=each.id, state="saved", tokens=len(each.ids), disk_bytes=each.num_bytes)
            for each in saved
            if each not in homes
        ]
        return states

    def close(self, until_s: float) -> None:
        """Save what is kept, the newest first, as long as there is time; drop all caches."""
        self._jobs.put(None)
        self._thread.join(max(until_s - time.monotonic(), 0))
        rate = 0.0
        for kept in sorted(self.kept, key=lambda each: -each.used):
            num_bytes, began_s = held_by(kept.cache).host_bytes, time.monotonic()
            if rate and began_s + num_bytes / rate > until_s:
                _logger.warning("a prefix of %d tokens is not saved: no time", len(kept.ids))
                continue
            if began_s < until_s:
                self._save(kept)
                rate = num_bytes / max(time.monotonic() - began_s, 1e-9)
        with self.mutex:
            dropped, self.kept = self.kept, []
        for kept in dropped:
            self._drop(kept)
