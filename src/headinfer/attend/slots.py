"""Partials of few query rows on CUDA: side by side until one launch merges them.

A tile is attended in parts, one to a program; each leaves its partial in a slot.
"""

import functools

import torch

from headinfer.attend.partial import Partial
from headinfer.attend.triton_merge import merge_slots
from headinfer.native.triton_launch import Program, power_of_2

LEAST_BLOCK_ROWS = 16
"""Rows of a matrix product at least, and `decode_token` serves no more. In float32 and the largest
head_dim, more take more of a multiprocessor's memory than cards of consumers have."""

MIN_SPLIT_TOKENS = 256
BLOCK_SLOTS = 32

_SLOTS_BYTES = 8 * 2**20
"""Partials kept until they are merged, where one tile's take no more: 500 for Llama-3-8B."""

BLOCK_BYTES = 2**14
"""Keys that a program reads at once, twice that in flight with the values."""

_MERGE = Program(merge_slots, num_warps=4)


@functools.lru_cache(1024)  # asked for each tile
def block_tokens_of(dim: int, itemsize: int, block_bytes: int = BLOCK_BYTES) -> int:
    """Return the tokens read at once."""
    return max(block_bytes // (power_of_2(dim) * itemsize), 16)


@functools.lru_cache(1024)
def split(
    kv_len: int, block_tokens: int, most_splits: int, least_tokens: int = MIN_SPLIT_TOKENS
) -> tuple[int, int]:
    """Return into how many parts some tokens are split, of whole blocks, and the tokens of each."""
    splits = max(min(most_splits, kv_len // least_tokens), 1)
    blocks = -(-kv_len // block_tokens)
    split_tokens = -(-blocks // splits) * block_tokens
    return -(-kv_len // split_tokens), split_tokens


class Slots:
    """A total of few query rows: partials side by side until they are merged in one launch.

    Args:
        query: `[batch, kv_heads, group, q_len, head_dim]`; contiguous where it is not to be copied.
        scale: factor of the scores.
        programs: programs that fill the device.

    Attributes:
        folded: see `Total.folded`.
        query: contiguous.
        scale: factor of the scores.
        heads: rows of the batch x KV heads.
        rows: query rows of one KV head.
        block_rows: rows of a matrix product.
        block_dim: elements of a program's rows.
        block_tokens: tokens that a program reads at once.
        most_splits: parts of a tile at most.
        capacity: slots there are.
        used: slots with partials.
        slots: outputs `[capacity, batch, kv_heads, group, q_len, head_dim]` and behind them their
            LSE, in float32.
    """

    folded: torch.Tensor | None = None
    _more: Partial | None = None  # merged from where it lies
    _sinks: torch.Tensor | None = None

    def __init__(self, query: torch.Tensor, scale: float, programs: int) -> None:
        batch, kv_heads, group, q_len, dim = query.shape
        self.query = query.contiguous()
        self.scale = float(scale)
        self.heads = batch * kv_heads
        self.rows = group * q_len
        self.block_rows = max(power_of_2(self.rows), LEAST_BLOCK_ROWS)
        self.block_dim = power_of_2(dim)
        self.block_tokens = block_tokens_of(dim, query.dtype.itemsize)
        self.most_splits = max(programs // self.heads, 1)
        self._all_rows = self.heads * self.rows
        slot_elements = self._all_rows * (dim + 1)
        slot_bytes = slot_elements * torch.float32.itemsize
        self.capacity = max(_SLOTS_BYTES // slot_bytes, self.most_splits + 1)
        self.slots = query.new_empty(self.capacity * slot_elements, dtype=torch.float32)
        self.used = 0

    def alone(self, dtype: torch.dtype) -> None:
        """Return None: partials lie in slots, and are merged."""

    def add(self, partial: Partial) -> None:
        """Merge a partial of the same queries; the first must stay as it is until the end."""
        out, lse = partial.out, partial.lse
        in_place = out.dtype == torch.float32 and out.is_contiguous() and lse.is_contiguous()
        if self._more is None and in_place:
            self._more = partial
            return
        if self.used == self.capacity:
            self.make_room()
        outs_size = self.capacity * self._all_rows * out.shape[-1]
        parts, lses = self.slots[:outs_size], self.slots[outs_size:]
        parts.view(-1, *out.shape)[self.used].copy_(out)
        lses.view(-1, *lse.shape)[self.used].copy_(lse)
        self.used += 1

    def add_sinks(self, sinks: torch.Tensor) -> None:
        """Merge attention sinks."""
        self._sinks = sinks.contiguous()

    def write(self, out: torch.Tensor) -> None:
        """Write the result."""
        self._merge(out.permute(0, 2, 3, 1, 4), None)

    def result(self) -> Partial:
        """Return the result in float32."""
        out = torch.empty(self.query.shape, dtype=torch.float32, device=self.query.device)
        lse = out.new_empty(out.shape[:-1])
        self._merge(out, lse)
        return Partial(out, lse)

    def make_room(self) -> None:
        """Merge all slots, so that they can be used again."""
        self._more = self.result()
        self.used = 0  # the merge is ordered before what is written over its slots

    def _merge(self, out: torch.Tensor, lse: torch.Tensor | None) -> None:
        """Merge all slots into `out[batch, kv_heads, group, q_len, dim]`, and into `lse` if any."""
        _, kv_heads, group, q_len, dim = self.query.shape
        more, sinks, slots = self._more, self._sinks, self.slots
        _MERGE.launch(
            (self._all_rows, 1, 1),
            (
                slots,
                *((more.out, more.lse) if more is not None else (slots, slots)),
                slots if sinks is None else sinks,
                out,
                slots if lse is None else lse,
            ),
            (self.used, self.capacity, kv_heads, group, q_len),
            out.stride()[:4],
            (
                *(dim, more is not None, sinks is not None, lse is not None),
                *(BLOCK_SLOTS, self.block_dim),
            ),
        )
