"""The token ids that a cache was given, so that another prompt can be compared with them."""

import copy
from collections.abc import Sequence

import torch

_MOST_PARTS = 1024
"""Parts that are joined to one: each new token comes as a part of its own."""


class TokenHistory:
    """A record of the token ids that went through a model with one cache.

    It is unknown as a whole where some tokens came as embeddings.
    """

    def __init__(self) -> None:
        self._parts: list[torch.Tensor] = []
        self._known = True

    def append(self, ids: torch.Tensor | None) -> None:
        """Note new tokens.

        Args:
            ids: `[rows, tokens]`, copied; None where they have no ids.
        """
        if ids is None:
            self._known = False
            return
        self._parts.append(ids.to("cpu", torch.long, copy=True))
        if len(self._parts) > _MOST_PARTS:
            self._join()

    def ids(self, rows: int, tokens: int) -> torch.Tensor | None:
        """Return the ids `[rows, tokens]` of int64; None where not all are known.

        Args:
            rows: of the cache.
            tokens: that it holds: others may have been kept or removed beside the model's calls.
        """
        if not self._known:
            return None
        joined = self._join()
        return joined if joined is not None and joined.shape == (rows, tokens) else None

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the newest tokens, all where there are no more."""
        left = tokens_to_remove
        while left > 0 and self._parts:
            last = self._parts.pop()
            if last.shape[1] > left:
                self._parts.append(last[:, :-left])
            left -= last.shape[1]
        if not self._parts:
            self.clear()

    def select(self, rows: Sequence[int]) -> None:
        """Make row `i` what row `rows[i]` was."""
        joined = self._join()
        self._parts = [] if joined is None else [joined[list(rows)]]

    def clear(self) -> None:
        """Forget all tokens."""
        self._parts, self._known = [], True

    def copy(self) -> "TokenHistory":
        """Return a record that goes on by itself."""
        other = copy.copy(self)
        other._parts = list(self._parts)  # none of them is written to
        return other

    def _join(self) -> torch.Tensor | None:
        if len({part.shape[0] for part in self._parts}) > 1:  # rows changed beside the cache
            self._known = False
        if not self._parts or not self._known:
            return None
        self._parts = [torch.cat(self._parts, dim=1)]
        return self._parts[0]


def common_prefix(first: torch.Tensor, second: torch.Tensor) -> int:
    """Return how many of the first elements of two lists of ids are the same."""
    most = min(len(first), len(second))
    differing = (first[:most] != second[:most]).nonzero()
    return int(differing[0]) if len(differing) else most
