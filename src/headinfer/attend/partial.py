"""Partial attention results and their exact merge.

Attention over a set of keys gives an output and the log-sum-exp (LSE) of its scores. Over the union
of two disjoint sets the output is the mean of the two outputs weighted by exp(LSE), and the LSE is
the logarithm of the summed exponentials. Everything here is this identity, in float32.

Axes: `batch, kv_heads, group, q_len, dim`; `group` counts the query heads that share a KV head.
"""

from dataclasses import dataclass
from typing import Protocol

import torch


@dataclass(slots=True)
class Partial:
    """Attention over some of the keys.

    Attributes:
        out: `[batch, kv_heads, group, q_len, value_dim]`, any floating dtype; owned by the holder.
        lse: `[batch, kv_heads, group, q_len]`, float32 (float64 for float64 inputs), natural
            logarithm; -inf where no key was visible, and `out` is 0 there.
    """

    out: torch.Tensor
    lse: torch.Tensor


class Kernel(Protocol):
    """Computes partials; keeps nothing of a call that would change another, and may be shared.

    One that derives from this class merges tiles by `Accumulator`, or by a `begin` of its own.
    """

    name: str

    def begin(self, query: torch.Tensor, *, scale: float) -> "TileAttention":
        """Return the attention of some queries to a set of tiles, none of them attended yet.

        Args:
            query: `[batch, kv_heads, group, q_len, key_dim]`, unchanged until the end.
            scale: factor of the scores.
        """
        return SeparateTiles(self, query, scale)

    def attend(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        *,
        scale: float,
        causal: bool = False,
        mask: torch.Tensor | None = None,
    ) -> Partial:
        """Attend `query` to all given keys that are visible.

        Args:
            query: `[batch, kv_heads, group, q_len, key_dim]`, any strides with a unit last one.
            keys: `[batch, kv_heads, kv_len, key_dim]`, likewise; never expanded over the group.
            values: `[batch, kv_heads, kv_len, value_dim]`, likewise.
            scale: factor of the scores.
            causal: query `i` sees key `j` only for `j <= i`; then `kv_len == q_len`.
            mask: bool `[batch or 1, q_len or 1, kv_len]`, True where visible; not with `causal`.

        Returns:
            The partial over these keys.
        """

    def decode(
        self,
        query: torch.Tensor,
        new: tuple[torch.Tensor, torch.Tensor],
        past: tuple[torch.Tensor, torch.Tensor],
        out: torch.Tensor,
        *,
        scale: float,
    ) -> None:
        """Attend one new token of each row to all tokens, and put it behind those before it.

        Args:
            query: `[batch, kv_heads, group, 1, key_dim]`.
            new: the token's key `[batch, kv_heads, 1, key_dim]`, and its value.
            past: keys `[batch, kv_heads, kv_len, key_dim]` and values; the last place of each is
                written.
            out: `[batch, 1, kv_heads, group, value_dim]`, written.
            scale: factor of the scores.
        """
        for tokens, token in zip(past, new, strict=True):
            tokens[:, :, -1:].copy_(token)
        tiles = self.begin(query, scale=scale)
        tiles.attend(*past)
        tiles.write(out)


class Total(Protocol):
    """Merges partials of the same queries."""

    def add(self, partial: Partial) -> None:
        """Merge a partial, which must stay as it is until the end."""

    def add_sinks(self, sinks: torch.Tensor) -> None:
        """Merge attention sinks, once all partials are; see `Accumulator.add_sinks`."""

    def write(self, out: torch.Tensor) -> None:
        """Write the result to `out[batch, q_len, kv_heads, group, value_dim]`, in its dtype."""


class TileAttention(Total, Protocol):
    """The attention of one chunk's queries to a set of tiles, which come one by one.

    Everything is enqueued on the stream that is current; a tile's memory may be overwritten by what
    is ordered after that.
    """

    def attend(
        self, keys: torch.Tensor, values: torch.Tensor, *, mask: torch.Tensor | None = None
    ) -> None:
        """Attend a tile; see `Kernel.attend`."""


def stack_rows(rows: list[Partial]) -> Partial:
    """Join the partials of single rows, each without the batch axis; a lone one is not copied."""
    if len(rows) == 1:
        return Partial(rows[0].out.unsqueeze(0), rows[0].lse.unsqueeze(0))
    return Partial(torch.stack([row.out for row in rows]), torch.stack([row.lse for row in rows]))


def empty_partial(query: torch.Tensor, value_dim: int) -> Partial:
    """Return the neutral element of the merge: no key visible to any query.

    Args:
        query: `[batch, kv_heads, group, q_len, key_dim]`.
        value_dim: elements of one value.
    """
    return Partial(
        query.new_zeros((*query.shape[:-1], value_dim)),
        query.new_full(query.shape[:-1], -torch.inf, dtype=accumulation_dtype(query.dtype)),
    )


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype scores and merges use for inputs of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class Accumulator:
    """Merges partials of the same queries one by one, in place, in float32."""

    def __init__(self) -> None:
        self._merged: Partial | None = None
        self._owned = False

    def add(self, partial: Partial) -> None:
        """Merge a partial; the first is kept as it is, so a single one passes through unrounded."""
        if self._merged is None:
            self._merged = partial
            return
        out, lse = self._owned_state()
        total = torch.logaddexp(lse, partial.lse)
        out.mul_(_weight(lse, total)).add_(partial.out * _weight(partial.lse, total))
        self._merged = Partial(out, total)

    def add_sinks(self, sinks: torch.Tensor) -> None:
        """Merge attention sinks: one key with a fixed score and a zero value for each query head.

        Args:
            sinks: scores `[kv_heads, group]` of the heads being merged.
        """
        out, lse = self._owned_state()
        total = torch.logaddexp(lse, sinks[None, :, :, None].to(lse.dtype))
        out.mul_(_weight(lse, total))
        self._merged = Partial(out, total)

    def _owned_state(self) -> tuple[torch.Tensor, torch.Tensor]:
        assert self._merged is not None, "nothing was merged yet"
        out, lse = self._merged.out, self._merged.lse
        if not self._owned:
            self._owned = True
            out = out.to(lse.dtype, copy=True)
        return out, lse

    def result(self) -> Partial:
        """Return what was merged."""
        assert self._merged is not None, "nothing was merged yet"
        return self._merged

    def write(self, out: torch.Tensor) -> None:
        """Write the result to `out[batch, q_len, kv_heads, group, value_dim]`, in its dtype."""
        out.copy_(self.result().out.permute(0, 3, 1, 2, 4))


def _weight(lse: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
    """Return exp(lse - total), 0 where no key is visible at all; one axis more for the dim."""
    return torch.where(lse == -torch.inf, 0.0, torch.exp(lse - total)).unsqueeze(-1)


class SeparateTiles:
    """Attends tile by tile with any kernel, and merges each partial as it comes.

    Args:
        kernel: what computes.
        query: `[batch, kv_heads, group, q_len, key_dim]`.
        scale: factor of the scores.
        total: what merges; an `Accumulator` by default.
    """

    def __init__(
        self, kernel: Kernel, query: torch.Tensor, scale: float, total: Total | None = None
    ) -> None:
        self._kernel = kernel
        self._query = query
        self._scale = scale
        self._total = total or Accumulator()

    def attend(
        self, keys: torch.Tensor, values: torch.Tensor, *, mask: torch.Tensor | None = None
    ) -> None:
        """Attend a tile."""
        self.add(self._kernel.attend(self._query, keys, values, scale=self._scale, mask=mask))

    def add(self, partial: Partial) -> None:
        """Merge a partial."""
        self._total.add(partial)

    def add_sinks(self, sinks: torch.Tensor) -> None:
        """Merge attention sinks."""
        self._total.add_sinks(sinks)

    def write(self, out: torch.Tensor) -> None:
        """Write the result."""
        self._total.write(out)
