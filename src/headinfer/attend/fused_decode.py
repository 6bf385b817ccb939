"""Decode on CUDA in two kinds of launch: one for each tile, and one that merges all of them.

With torch's kernel a tile takes some 35 launches, most of them to merge: on an H100 whose host
needs 25 us for a launch that was a millisecond for each tile, longer than its copy takes.
"""

import copy

import torch

from headinfer.attend.partial import Kernel, Partial, SeparateTiles, TileAttention
from headinfer.attend.triton_kernels import attend_tile, merge_slots
from headinfer.attend.triton_launch import Program

MAX_ROWS = 64
"""Query rows of one KV head up to which a step is bound by reading keys and values."""

_SLOTS_BYTES = 8 * 2**20
"""Of partials kept until they are merged, where one tile's take no more: 500 for Llama-3-8B."""

_MIN_SPLIT_TOKENS = 256
_PROGRAMS_PER_MULTIPROCESSOR = 2
_BLOCK_SLOTS = 32

_ATTEND = Program(attend_tile, num_warps=4, num_stages=2)
_MERGE = Program(merge_slots, num_warps=4)


def serves(dtype: torch.dtype, head_dim: int) -> bool:
    """Whether the programs are made for keys and values of this dtype and head_dim."""
    return dtype in (torch.float32, torch.float16, torch.bfloat16) and 16 <= head_dim <= 256


def _power_of_2(number: int) -> int:
    """Return the least power of 2 that is not below a number."""
    return 1 << (number - 1).bit_length()


class FusedDecodeKernel(Kernel):
    """Few query rows by Triton; all else by another kernel.

    Args:
        other: what serves more rows, causal squares and masks that differ between queries.
        multiprocessors: of the device.
    """

    def __init__(self, other: Kernel, multiprocessors: int) -> None:
        self.name = f"Triton decode and {other.name}"
        self._other = other
        self._programs = _PROGRAMS_PER_MULTIPROCESSOR * multiprocessors

    @property
    def to_check(self) -> Kernel:
        """This kernel, with the other one as it is to be checked."""
        strict = copy.copy(self)
        strict._other = self._other.to_check
        return strict

    def begin(self, query: torch.Tensor, *, scale: float) -> TileAttention:
        """Return the attention of some queries to a set of tiles; see `Kernel.begin`."""
        if 0 < query.shape[2] * query.shape[3] <= MAX_ROWS:
            return FusedTiles(query, scale, self._programs)
        return SeparateTiles(self._other, query, scale)

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
        """Attend one tile; see `Kernel.attend`."""
        rows, square = query.shape[2] * query.shape[3], causal and query.shape[3] > 1
        many = mask is not None and mask.shape[1] > 1
        if not 0 < rows <= MAX_ROWS or square or many:
            return self._other.attend(query, keys, values, scale=scale, causal=causal, mask=mask)
        tiles = FusedTiles(query, scale, self._programs)
        tiles.attend(keys, values, mask=mask)
        return tiles.result()


class FusedTiles:
    """The partials of one query's tiles, side by side until they are merged in one launch.

    Args:
        query: `[batch, kv_heads, group, q_len, head_dim]`; contiguous where it is not to be copied.
        scale: factor of the scores.
        programs: programs that fill the device.
    """

    def __init__(self, query: torch.Tensor, scale: float, programs: int) -> None:
        self._query = query.contiguous()
        self._scale = float(scale)
        batch, kv_heads, group, q_len, dim = query.shape
        self._heads = batch * kv_heads
        self._rows = self._heads * group * q_len
        self._most_splits = max(programs // self._heads, 1)
        self._dim = dim
        self._block_dim = _power_of_2(dim)
        row_bytes = self._rows * (dim + 1) * torch.float32.itemsize
        self._capacity = max(_SLOTS_BYTES // row_bytes, self._most_splits + 1)
        elements = self._capacity * self._rows * (dim + 1)  # outputs, and behind them their LSE
        self._slots = torch.empty(elements, dtype=torch.float32, device=query.device)
        self._used = 0
        self._sinks: torch.Tensor | None = None

    def attend(
        self, keys: torch.Tensor, values: torch.Tensor, *, mask: torch.Tensor | None = None
    ) -> None:
        """Attend a tile, of which `mask[batch or 1, 1, kv_len]` tokens are visible."""
        kv_len = keys.shape[2]
        if not kv_len:
            return
        query, block_tokens = self._query, self._block_tokens(keys)
        splits = max(min(self._most_splits, kv_len // _MIN_SPLIT_TOKENS), 1)
        blocks = -(-kv_len // block_tokens)
        split_tokens = -(-blocks // splits) * block_tokens
        splits = -(-kv_len // split_tokens)
        self._make_room(splits)
        if keys.stride() != values.stride() or keys.stride(3) != 1:
            keys, values = keys.contiguous(), values.contiguous()
        rows = query.shape[2] * query.shape[3]
        _ATTEND.launch(
            (splits, self._heads, 1),
            (
                query,
                keys,
                values,
                query if mask is None else mask.expand(query.shape[0], 1, kv_len).contiguous(),
                self._slots,
            ),
            (
                *(self._scale, kv_len, split_tokens, self._used),
                *(query.shape[1], rows, self._capacity),
            ),
            keys.stride()[:3],
            (
                query.shape[4],
                mask is not None,
                max(_power_of_2(rows), 16),
                self._block_dim,
                block_tokens,
            ),
        )
        self._used += splits

    def _block_tokens(self, keys: torch.Tensor) -> int:
        """Return the tokens read at once: 16 KiB of keys, twice that in flight with the values."""
        return max(2**14 // (self._block_dim * keys.itemsize), 16)

    def add(self, partial: Partial) -> None:
        """Merge a partial of the same queries."""
        self._make_room(1)
        rows, dim = self._rows, self._dim
        parts, lses = self._slots.split((self._capacity * rows * dim, self._capacity * rows))
        parts.view(-1, *partial.out.shape)[self._used].copy_(partial.out)
        lses.view(-1, *partial.lse.shape)[self._used].copy_(partial.lse)
        self._used += 1

    def add_sinks(self, sinks: torch.Tensor) -> None:
        """Merge attention sinks."""
        self._sinks = sinks.contiguous()

    def write(self, out: torch.Tensor) -> None:
        """Write the result."""
        self._merge(out.permute(0, 2, 3, 1, 4), None)

    def result(self) -> Partial:
        """Return the result in float32."""
        out = torch.empty(self._query.shape, dtype=torch.float32, device=self._query.device)
        lse = out.new_empty(out.shape[:-1])
        self._merge(out, lse)
        return Partial(out, lse)

    def _make_room(self, slots: int) -> None:
        if self._used + slots > self._capacity:
            merged = self.result()
            self._used = 0  # the merge is ordered before what is written over its slots
            self.add(merged)

    def _merge(self, out: torch.Tensor, lse: torch.Tensor | None) -> None:
        """Merge all slots into `out[batch, kv_heads, group, q_len, dim]`, and into `lse` if any."""
        _, kv_heads, group, q_len, dim = self._query.shape
        _MERGE.launch(
            (self._rows, 1, 1),
            (
                self._slots,
                self._slots if self._sinks is None else self._sinks,
                out,
                self._slots if lse is None else lse,
            ),
            (self._used, self._capacity, kv_heads, group, q_len),
            out.stride()[:4],
            (
                dim,
                self._sinks is not None,
                lse is not None,
                _BLOCK_SLOTS,
                self._block_dim,
            ),
        )
