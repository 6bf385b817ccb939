"""Partial attention results and their exact merge.

Attention over a set of keys gives an output and the log-sum-exp (LSE) of its scores. Over the union
of two disjoint sets the output is the mean of the two outputs weighted by exp(LSE). The LSE of the
union is the logarithm of the summed exponentials. Everything here is this identity, in float32.

Partials are merged in three places: here by torch, in `triton_merge` on CUDA, and in
`native/merge.h` by the C kernels. There is no fourth.

Axes: `batch, kv_heads, group, q_len, dim`; `group` counts the query heads that share a KV head.
"""

from dataclasses import dataclass

import torch


@dataclass(slots=True)
class Partial:
    """A result of attention over some of the keys.

    Attributes:
        out: `[batch, kv_heads, group, q_len, value_dim]`, any floating dtype; owned by the holder.
        lse: `[batch, kv_heads, group, q_len]`, float32 (float64 for float64 inputs), natural
            logarithm; -inf where no key was visible, and `out` is 0 there.
    """

    out: torch.Tensor
    lse: torch.Tensor


def join_queries(parts: list[Partial]) -> Partial:
    """Join the partials of consecutive queries; a lone one is not copied."""
    if len(parts) == 1:
        return parts[0]
    out = torch.cat([part.out for part in parts], dim=3)
    return Partial(out, torch.cat([part.lse for part in parts], dim=3))


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype scores and merges use for inputs of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def as_result(partial: Partial, dtype: torch.dtype) -> torch.Tensor | None:
    """Return a partial's output `[batch, q_len, kv_heads, group, value_dim]`, where it lies so.

    None where it would have to be copied.
    """
    out = partial.out.permute(0, 3, 1, 2, 4)
    return out if out.dtype == dtype and out.is_contiguous() else None


class Accumulator:
    """A total by torch: merges partials one by one, in place, in float32.

    Attributes:
        folded: see `Total.folded`.
    """

    folded: torch.Tensor | None = None
    _merged: Partial | None = None
    _owned = False  # whether the output is memory of its own, in float32

    def add(self, partial: Partial) -> None:
        """Merge a partial; the first is kept as it is, so a single one passes through unrounded."""
        merged = self._merged
        if merged is None:
            self._merged = partial
            return
        out, lse, other = merged.out, merged.lse, partial.lse
        if not self._owned:
            self._owned = True
            out = out.to(lse.dtype, copy=True)
        total = torch.logaddexp(lse, other)
        # A set of keys of which none is visible weighs 0; its LSE less the total is no number.
        weight = (lse - total).exp_().masked_fill_(lse == -torch.inf, 0.0)
        other_weight = (other - total).exp_().masked_fill_(other == -torch.inf, 0.0)
        out.mul_(weight.unsqueeze(-1)).add_(partial.out * other_weight.unsqueeze(-1))
        self._merged = Partial(out, total)

    def add_sinks(self, sinks: torch.Tensor) -> None:
        """Merge attention sinks: one key with a fixed score and a zero value for each query head.

        Args:
            sinks: scores `[kv_heads, group]` of the heads being merged.
        """
        if self._merged is not None:
            lse = self._merged.lse
            scores = sinks[None, :, :, None].to(lse.dtype).expand_as(lse)
            self.add(Partial(lse.new_zeros(1), scores))

    def result(self) -> Partial:
        """Return what was merged."""
        assert self._merged is not None, "nothing was merged yet"
        return self._merged

    def alone(self, dtype: torch.dtype) -> torch.Tensor | None:
        """Return the output of the one partial that was added; see `Total.alone`."""
        return None if self._owned or self._merged is None else as_result(self._merged, dtype)

    def write(self, out: torch.Tensor) -> None:
        """Write the result to `out[batch, q_len, kv_heads, group, value_dim]`, in its dtype."""
        if self._merged is None:  # no key at all
            out.zero_()
        else:
            out.copy_(self._merged.out.permute(0, 3, 1, 2, 4))
