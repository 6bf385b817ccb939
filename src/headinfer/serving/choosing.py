"""Which cache a prompt takes: one in memory, a running request's, or what the disk has."""

import logging
import threading
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from headinfer.errors import HeadInferError
from headinfer.integration.cache import OffloadedCache
from headinfer.serving.kept import LEAST_TOKENS, Kept, Lent, next_tick, usable
from headinfer.serving.prefix_folder import SavedPrefix
from headinfer.serving.shelf import Shelf

_logger = logging.getLogger(__name__)

LOOK_S = 0.2
"""How often one that waits for others looks whether somebody still waits for it."""

_DISK_DIVISOR = 8
"""What the disk has is loaded where that spares one in so many tokens more than memory does."""


class Choice(NamedTuple):
    """A choice of what a prompt begins with: a cache in memory, a running request's, or the disk.

    Attributes:
        tokens: of the prompt that it spares.
        source: what has them.
        whole: whether it may be taken over, as the prompt goes on where it ends.
    """

    tokens: int
    source: Kept | Lent | SavedPrefix
    whole: bool

    def rank(self) -> tuple[int, bool]:
        """Return what makes it better than another one, where that is larger."""
        return self.tokens, self.whole


class Chooser:
    """A chooser of the cache that spares a prompt the most tokens.

    A prompt takes a kept cache over where it goes on at its end, and else a fork.

    Args:
        shelf: what is kept.
        lent: caches of requests, changed with the shelf's mutex; only looked at here.
        changed: with the shelf's mutex; told of each request that has ended.
        goes_back: whether caches can be cropped.
    """

    def __init__(
        self,
        shelf: Shelf,
        lent: list[Lent],
        changed: threading.Condition,
        *,
        goes_back: bool,
    ) -> None:
        self._shelf = shelf
        self._lent = lent
        self._changed = changed
        self._goes_back = goes_back

    def find(self, prompt: torch.Tensor, given_up: Callable[[], bool]) -> Lent | None:
        """Return the longest beginning of a prompt that any cache holds, for one request alone.

        Waits for requests that are about to end, where they may leave more of the prompt.

        Args:
            prompt: `[tokens]` of int64.
            given_up: whether nobody waits any more, asked now and then.

        Returns:
            A cache with that beginning; None where nothing has enough of it.
        """
        tried: list[Kept | Lent | SavedPrefix] = []
        while True:
            with self._shelf.mutex:
                choice = self._choose(prompt, tried)
                most = 0 if choice is None else choice.tokens
                if not given_up() and any(e.will_leave(prompt) > most for e in self._lent):
                    self._changed.wait(LOOK_S)
                    continue
                if choice is None:
                    return None
                self._claim(choice)
            lent = None
            try:
                lent = self._lent_of(choice, prompt)
            except HeadInferError as error:  # as of a running request that has just failed
                _logger.warning("a prefix is not used: %s", error)
            finally:
                self._unclaim(choice, used=lent is not None)
            if lent is not None:
                return lent
            tried.append(choice.source)

    def _choose(self, prompt: torch.Tensor, tried: Sequence[object]) -> Choice | None:
        """Return what spares a prompt the most tokens; memory comes before the disk."""
        in_memory: list[Choice] = []
        on_disk: list[Choice] = []
        for kept in self._shelf.kept:
            tokens = kept.serves(prompt)
            whole = tokens == len(kept.ids) and not (kept.busy or kept.snapshot)
            in_memory.append(Choice(tokens, kept, whole))
        if self._goes_back:  # else what was read is there as snapshots
            for lent in (each for each in self._lent if not each.ended):
                tokens = usable(lent.ids[: lent.read_tokens], prompt, 0)
                in_memory.append(Choice(tokens, lent, whole=False))
        for saved in self._shelf.saved:
            tokens = usable(saved.ids, prompt, saved.earliest_crop)
            # Where caches cannot go back, others may need it just as it is.
            taken = saved.owned or saved.named
            whole = self._goes_back and tokens == len(saved.ids) and not taken
            on_disk.append(Choice(tokens, saved, whole))
        best, other = (
            max(
                (each for each in choices if each.source not in tried),
                key=Choice.rank,
                default=None,
            )
            for choices in (in_memory, on_disk)
        )
        most = 0 if best is None else best.tokens
        if other is not None and (other.tokens - most) * _DISK_DIVISOR > other.tokens:
            best = other
        return best if best is not None and best.tokens else None

    def _claim(self, choice: Choice) -> None:
        """Keep others from what was chosen."""
        source = choice.source
        if isinstance(source, Lent):
            return
        source.used = next_tick()
        if isinstance(source, SavedPrefix):
            source.owned = source.owned or choice.whole
        elif choice.whole:
            self._shelf.kept.remove(source)
        else:
            source.busy += 1

    def _unclaim(self, choice: Choice, *, used: bool) -> None:
        """Let others have what was not taken over."""
        source = choice.source
        with self._shelf.mutex:
            if isinstance(source, Kept) and not choice.whole:
                source.busy -= 1
            elif isinstance(source, SavedPrefix) and choice.whole and not used:
                source.owned = False

    def _lent_of(self, choice: Choice, prompt: torch.Tensor) -> Lent | None:
        """Return what was chosen, for a request alone; None where it gives nothing after all."""
        source = choice.source
        if isinstance(source, Kept) and choice.whole:
            return Lent(
                cache=source.cache, ids=prompt, cached_tokens=choice.tokens, home=source.home
            )
        if not isinstance(source, SavedPrefix):
            return self._cut(source.cache.fork(), prompt, None)
        cache = self._shelf.load(source)
        lent = None
        if cache is not None:
            lent = self._cut(cache, prompt, source if choice.whole else None)
        if lent is None:  # it may go back less far than was thought
            source.earliest_crop = len(source.ids)
        return lent

    def _cut(
        self, cache: OffloadedCache, prompt: torch.Tensor, home: SavedPrefix | None
    ) -> Lent | None:
        """Return a cache of nobody else with what a prompt shares with it; None for too little."""
        try:
            tokens = cache.keep_common_prefix(prompt)
            if tokens >= LEAST_TOKENS:
                cache.park()
                cache.compact()
                return Lent(cache=cache, ids=prompt, cached_tokens=tokens, home=home)
        except BaseException:
            cache.close()
            raise
        cache.close()
        return None
