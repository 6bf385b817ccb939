"""The merge of a chunk's partials on CUDA: each is read once, by one launch.

As separate operations on tensors a merge moves some four times the bytes: for Llama-3-8B it took a
tenth of the time that a tile of 16K tokens is attended in.
"""

import torch

from headinfer.attend.partial import Kernel, Partial, SeparateTiles
from headinfer.attend.triton_launch import Program
from headinfer.attend.triton_merge import merge_two

_BLOCK_ELEMENTS = 2048
"""Elements of an output that one program merges: 16 for each of its threads."""

_MERGE_TWO = Program(merge_two, num_warps=4)


class FusedAccumulator:
    """Merges partials of the same queries in float32, as `Accumulator` does.

    The newest partial waits, so that the last merge writes the result itself.
    """

    def __init__(self) -> None:
        self._merged: Partial | None = None
        self._owned = False  # whether what was merged is float32 memory of its own
        self._waiting: Partial | None = None
        self._sinks: torch.Tensor | None = None

    def add(self, partial: Partial) -> None:
        """Merge a partial, which must stay as it is until the end."""
        if self._merged is None:
            self._merged = partial
            return
        if self._waiting is not None:
            self._merge_waiting()
        self._waiting = partial

    def add_sinks(self, sinks: torch.Tensor) -> None:
        """Merge attention sinks `[kv_heads, group]`."""
        self._sinks = sinks

    def write(self, out: torch.Tensor) -> None:
        """Write the result to `out[batch, q_len, kv_heads, group, value_dim]`, in its dtype."""
        assert self._merged is not None, "nothing was merged yet"
        out = out.permute(0, 2, 3, 1, 4)
        if self._waiting is None and self._sinks is None:
            out.copy_(self._merged.out)
        else:
            _merge(self._merged, self._waiting, self._sinks, Partial(out, self._merged.lse), False)

    def _merge_waiting(self) -> None:
        assert self._merged is not None
        out = self._merged.out
        if not self._owned:
            out, self._owned = torch.empty_like(out, dtype=torch.float32), True
        # Not in place: several threads of the program read the LSE that one of them writes.
        target = Partial(out, torch.empty(out.shape[:-1], dtype=torch.float32, device=out.device))
        _merge(self._merged, self._waiting, None, target, True)
        self._merged, self._waiting = target, None


def _merge(
    first: Partial,
    second: Partial | None,
    sinks: torch.Tensor | None,
    target: Partial,
    with_lse: bool,
) -> None:
    """Merge one or two partials and sinks into `target`, whose output may be the first's."""
    batch, kv_heads, group, q_len, dim = first.out.shape
    other = first if second is None else second
    parts = [_readable(part) for part in (first, other)]
    block_dim = 1 << (dim - 1).bit_length()
    block_tokens = max(_BLOCK_ELEMENTS // block_dim, 1)
    _MERGE_TWO.launch(
        (-(-q_len // block_tokens), batch * kv_heads * group, 1),
        (
            *(parts[0].out, parts[0].lse, parts[1].out, parts[1].lse),
            parts[0].lse if sinks is None else sinks.contiguous(),
            *(target.out, target.lse),
        ),
        (kv_heads, group, q_len),
        (*parts[0].out.stride()[:4], *parts[1].out.stride()[:4], *target.out.stride()[:4]),
        (dim, second is not None, sinks is not None, with_lse, block_tokens, block_dim),
    )


def _readable(partial: Partial) -> Partial:
    """Return a partial whose output has adjacent elements and whose LSE is contiguous."""
    out = partial.out if partial.out.stride(4) == 1 else partial.out.contiguous()
    return Partial(out, partial.lse.contiguous())


class MergedTiles(SeparateTiles):
    """Attends tile by tile with any kernel, and merges the partials by `FusedAccumulator`."""

    def __init__(self, kernel: Kernel, query: torch.Tensor, scale: float) -> None:
        super().__init__(kernel, query, scale, FusedAccumulator())

    def attend(
        self, keys: torch.Tensor, values: torch.Tensor, *, mask: torch.Tensor | None = None
    ) -> None:
        """Attend a tile."""
        # Laid out so that queries fold over their group as a view, for this tile and all others.
        self._query = self._query.contiguous()
        super().attend(keys, values, mask=mask)
