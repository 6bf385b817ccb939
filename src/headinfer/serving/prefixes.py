"""Caches of requests before, kept for those that begin with the same tokens."""

from collections.abc import Sequence
from dataclasses import dataclass

from headinfer.integration.cache import OffloadedCache
from headinfer.session import Session


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Lent:
    """A cache that a request has for itself.

    Attributes:
        cache: holds the beginning of the prompt.
        cached_tokens: of it.
        ids: the prompt.
    """

    cache: OffloadedCache
    cached_tokens: int
    ids: tuple[int, ...]


class Prefixes:
    """A keeper of the caches that requests leave behind.

    Args:
        session: makes caches.
    """

    def __init__(self, session: Session) -> None:
        self._session = session

    def lend(self, ids: Sequence[int], new_tokens: int) -> Lent:
        """Return a cache for a prompt.

        Args:
            ids: the prompt.
            new_tokens: the most tokens of the answer.
        """
        cache = self._session.new_cache(len(ids) + new_tokens)
        return Lent(cache=cache, cached_tokens=0, ids=tuple(ids))

    def note_progress(self, lent: Lent) -> None:
        """Hear that more of a prompt was read; called in the model's call."""

    def give_back(self, lent: Lent, *, keep: bool) -> None:
        """Take a cache back.

        Args:
            lent: of a request that has ended.
            keep: whether what it holds is sound.
        """
        lent.cache.close()

    def close(self, timeout_s: float) -> None:
        """Drop all caches, saved where there is a folder."""
