"""The merge of a chunk's partials on CUDA: each is read once, and some of them by one launch.

As separate operations on tensors a merge moves some four times the bytes. One partial after the
other would have what was merged, in float32, read and written for each of them.

Measured for Llama-3-8B: such a merge took a tenth of the time that a tile of 16K tokens is attended
in.
"""

import itertools

import torch

from headinfer.attend.partial import Partial, as_result
from headinfer.attend.triton_merge import merge_few
from headinfer.native.triton_launch import Program, power_of_2

_BLOCK_ELEMENTS = 2048
"""Elements of an output that one program merges: 16 for each of its threads."""

_AT_ONCE = 4
"""Partials that one launch reads; as many parameters of the program. A chunk of 100K tokens in
bfloat16 has 8. Merged one by one they move 66 bytes an element, and four at once 34."""

_MERGE = Program(merge_few, num_warps=4)


class FusedAccumulator:
    """A total by Triton: merges partials in float32, as `Accumulator` does.

    Some partials wait, so that one launch reads all of them, and the last one writes the result
    itself.

    Attributes:
        folded: see `Total.folded`.
    """

    folded: torch.Tensor | None = None
    _owned = False  # whether the first of what waits is float32 memory of its own
    _sinks: torch.Tensor | None = None

    def __init__(self) -> None:
        self._waiting: list[Partial] = []

    def add(self, partial: Partial) -> None:
        """Merge a partial, which must stay as it is until the end."""
        if len(self._waiting) == _AT_ONCE:
            out = self._waiting[0].out
            if not self._owned:
                out, self._owned = torch.empty_like(out, dtype=torch.float32), True
            # Not in place: several threads of the program read the LSE that one of them writes.
            lse = torch.empty(out.shape[:-1], dtype=torch.float32, device=out.device)
            self._merge(out, lse)
            self._waiting = [Partial(out, lse)]
        self._waiting.append(partial)

    def add_sinks(self, sinks: torch.Tensor) -> None:
        """Merge attention sinks `[kv_heads, group]`."""
        self._sinks = sinks.contiguous()

    def alone(self, dtype: torch.dtype) -> torch.Tensor | None:
        """Return the output of the one partial that was added; see `Total.alone`."""
        if len(self._waiting) != 1 or self._sinks is not None:
            return None
        return as_result(self._waiting[0], dtype)

    def write(self, out: torch.Tensor) -> None:
        """Write the result to `out[batch, q_len, kv_heads, group, value_dim]`, in its dtype."""
        if not self._waiting:  # no key at all
            out.zero_()
        elif len(self._waiting) == 1 and self._sinks is None:
            out.copy_(self._waiting[0].out.permute(0, 3, 1, 2, 4))
        else:
            self._merge(out.permute(0, 2, 3, 1, 4), None)

    def _merge(self, out: torch.Tensor, lse: torch.Tensor | None) -> None:
        """Merge what waits and sinks into `out`, which may be the first's, and `lse` if any."""
        parts = []
        for partial in self._waiting:
            # The program reads outputs with adjacent elements, and contiguous LSE.
            part = partial.out if partial.out.stride(4) == 1 else partial.out.contiguous()
            parts.append((part, partial.lse.contiguous()))
        parts += parts[:1] * (_AT_ONCE - len(parts))  # which are not read
        first, first_lse = parts[0]
        batch, kv_heads, group, q_len, dim = first.shape
        block_dim = power_of_2(dim)
        block_tokens = max(_BLOCK_ELEMENTS // block_dim, 1)
        _MERGE.launch(
            (-(-q_len // block_tokens), batch * kv_heads * group, 1),
            (
                *itertools.chain.from_iterable(parts),
                first_lse if self._sinks is None else self._sinks,
                *(out, first_lse if lse is None else lse),
            ),
            (len(self._waiting), kv_heads, group, q_len),
            tuple(stride for each, _ in (*parts, (out, None)) for stride in each.stride()[:4]),
            (dim, self._sinks is not None, lse is not None, block_tokens, block_dim),
        )
