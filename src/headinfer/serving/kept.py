"""Caches that are kept, and those that requests have: what each holds, and spares a prompt."""

import itertools
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from headinfer.integration.cache import OffloadedCache
from headinfer.integration.token_history import common_prefix
from headinfer.serving.prefix_folder import SavedPrefix

LEAST_TOKENS = 16
"""A shorter common beginning is read again: most prompts of a model begin with the same few."""

_SNAPSHOTS = 8
"""Snapshots of a prompt whose cache cannot go back, beside those at its end and at its marks."""

_ticks = itertools.count(1)


def next_tick() -> int:
    """Return a number that is larger than all before."""
    return next(_ticks)


@dataclass(slots=True, kw_only=True, eq=False)
class Kept:
    """A prefix that is kept in memory.

    Attributes:
        ids: its tokens, `[tokens]` of int64.
        cache: parked, with just these tokens.
        earliest_crop: the fewest tokens that it can go back to; asked once, as a turn may be waited
            for.
        lasting: whether it is worth a place on the disk.
        snapshot: whether it was left behind in a prompt, for others to begin with.
        home: has its first tokens on the disk, or all; it saves there.
        busy: users that it must stay as it is for.
        used: grows with each use.
        id: a name.
    """

    ids: torch.Tensor
    cache: OffloadedCache
    earliest_crop: int
    lasting: bool = True
    snapshot: bool = False
    home: SavedPrefix | None = None
    busy: int = 0
    used: int = 0
    id: str = field(default_factory=lambda: secrets.token_hex(8))

    def serves(self, prompt: torch.Tensor) -> int:
        """Return how many of a prompt's first tokens it spares."""
        return usable(self.ids, prompt, self.earliest_crop)

    def covers(self, other: "Kept") -> bool:
        """Whether it spares whatever another one would."""
        goes_back = self.earliest_crop <= other.earliest_crop
        return goes_back and begins_with(self.ids, other.ids)

    @property
    def is_saved(self) -> bool:
        """Whether the disk has all of it."""
        return self.home is not None and len(self.home.ids) == len(self.ids)


@dataclass(slots=True, kw_only=True, eq=False)
class Lent:
    """A cache that a request has for itself.

    Attributes:
        cache: holds the beginning of the prompt.
        ids: the prompt, `[tokens]` of int64.
        cached_tokens: of the prompt, when it was lent.
        read_tokens: of the prompt, by now.
        snapshot_tokens: of the newest snapshot.
        saved_tokens: that were written to the disk, or are about to be.
        marks: positions at which others may part from the prompt.
        home: as of `Kept`.
        kept: what became of it.
        id: of the request.
        slot_id: of what is kept with all that it held, once it was given back.
        given_up: whether nobody waits for the answer any more.
        ended: whether the request has, though what it read may not be kept yet.
    """

    cache: OffloadedCache
    ids: torch.Tensor
    cached_tokens: int = 0
    read_tokens: int = 0
    snapshot_tokens: int = 0
    saved_tokens: int = 0
    marks: frozenset[int] = frozenset()
    home: SavedPrefix | None = None
    kept: Kept | None = None
    id: str = field(default_factory=lambda: secrets.token_hex(8))
    slot_id: str | None = None
    given_up: Callable[[], bool] = lambda: False
    ended: bool = False

    @property
    def begun(self) -> bool:
        """Whether its first pass has begun, and so has taken memory."""
        engine = self.cache.state.engine
        return engine is not None and not engine.parked

    def will_leave(self, prompt: torch.Tensor) -> int:
        """Return how many of a prompt's tokens it may leave behind, after its running chunk."""
        return usable(self.ids, prompt, 0) if self.ended or self.given_up() else 0

    def is_due(self, held_tokens: int) -> bool:
        """Whether to keep a snapshot of what was read."""
        new = held_tokens - self.snapshot_tokens
        if held_tokens in self.marks or held_tokens == len(self.ids):
            return new > 0
        return new >= max(len(self.ids) // _SNAPSHOTS, LEAST_TOKENS)


def usable(held: torch.Tensor, prompt: torch.Tensor, earliest_crop: int) -> int:
    """Return how many tokens of a cache a prompt can use; 0 for too few.

    Args:
        held: the cache's tokens.
        prompt: of which at least one token must be read.
        earliest_crop: the fewest that the cache can go back to.
    """
    common = min(common_prefix(held, prompt), len(prompt) - 1)
    if common < LEAST_TOKENS or (common < len(held) and common < earliest_crop):
        return 0
    return common


def begins_with(ids: torch.Tensor, first: torch.Tensor) -> bool:
    """Whether some tokens begin with others."""
    return common_prefix(ids, first) == len(first)


def as_ids(ids: Sequence[int]) -> torch.Tensor:
    """Return token ids as a tensor of int64."""
    return torch.tensor(ids, dtype=torch.long)
