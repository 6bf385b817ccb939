"""The merge of a chunk's partials on CUDA: each is read once, by one launch.

As separate operations on tensors a merge moves some four times the bytes.

Measured for Llama-3-8B: such a merge took a tenth of the time that a tile of 16K tokens is attended
in.
"""

import torch

from headinfer.attend.partial import Partial, as_result
from headinfer.attend.triton_merge import merge_two
from headinfer.native.triton_launch import Program

_BLOCK_ELEMENTS = 2048
"""Elements of an output that one program merges: 16 for each of its threads."""

_MERGE_TWO = Program(merge_two, num_warps=4)


class FusedAccumulator:
    """A total by Triton: merges partials in float32, as `Accumulator` does.

    The newest partial waits, so that the last merge writes the result itself.

    Attributes:
        folded: see `Total.folded`.
    """

    folded: torch.Tensor | None = None
    _merged: Partial | None = None
    _owned = False  # whether what was merged is float32 memory of its own
    _waiting: Partial | None = None
    _sinks: torch.Tensor | None = None

    def add(self, partial: Partial) -> None:
        """Merge a partial, which must stay as it is until the end."""
        merged = self._merged
        if merged is None:
            self._merged = partial
            return
        if self._waiting is not None:
            out = merged.out
            if not self._owned:
                out, self._owned = torch.empty_like(out, dtype=torch.float32), True
            # Not in place: several threads of the program read the LSE that one of them writes.
            lse = torch.empty(out.shape[:-1], dtype=torch.float32, device=out.device)
            self._merge(out, lse)
            self._merged = Partial(out, lse)
        self._waiting = partial

    def add_sinks(self, sinks: torch.Tensor) -> None:
        """Merge attention sinks `[kv_heads, group]`."""
        self._sinks = sinks.contiguous()

    def alone(self, dtype: torch.dtype) -> torch.Tensor | None:
        """Return the output of the one partial that was added; see `Total.alone`."""
        if self._merged is None or self._waiting is not None or self._sinks is not None:
            return None
        return as_result(self._merged, dtype)

    def write(self, out: torch.Tensor) -> None:
        """Write the result to `out[batch, q_len, kv_heads, group, value_dim]`, in its dtype."""
        if self._merged is None:  # no key at all
            out.zero_()
        elif self._waiting is None and self._sinks is None:
            out.copy_(self._merged.out.permute(0, 3, 1, 2, 4))
        else:
            self._merge(out.permute(0, 2, 3, 1, 4), None)

    def _merge(self, out: torch.Tensor, lse: torch.Tensor | None) -> None:
        """Merge what is there and sinks into `out`, which may be the first's, and `lse` if any."""
        assert self._merged is not None
        parts = []
        for partial in (self._merged, self._waiting or self._merged):
            # The program reads outputs with adjacent elements, and contiguous LSE.
            part = partial.out if partial.out.stride(4) == 1 else partial.out.contiguous()
            parts.append((part, partial.lse.contiguous()))
        (first, first_lse), (second, second_lse) = parts
        batch, kv_heads, group, q_len, dim = first.shape
        block_dim = 1 << (dim - 1).bit_length()
        block_tokens = max(_BLOCK_ELEMENTS // block_dim, 1)
        with_second, with_sinks = self._waiting is not None, self._sinks is not None
        _MERGE_TWO.launch(
            (-(-q_len // block_tokens), batch * kv_heads * group, 1),
            (
                *(first, first_lse, second, second_lse),
                first_lse if self._sinks is None else self._sinks,
                *(out, first_lse if lse is None else lse),
            ),
            (kv_heads, group, q_len),
            (*first.stride()[:4], *second.stride()[:4], *out.stride()[:4]),
            (dim, with_second, with_sinks, lse is not None, block_tokens, block_dim),
        )
