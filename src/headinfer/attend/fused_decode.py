"""Decode on CUDA: one launch for each tile and one that merges all of them, or one for all of it.

With torch's kernel a tile takes some 35 launches, most of them to merge. Where all tokens are
resident, a single launch also keeps the new one.

Measured on an H100 whose host needs 25 us for a launch: torch's launches took a millisecond for
each tile, longer than its copy takes.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch

from headinfer.attend.fused_merge import FusedAccumulator
from headinfer.attend.partial import Partial
from headinfer.attend.table import Kernels
from headinfer.attend.triton_kernels import attend_tile, decode_token
from headinfer.attend.triton_launch import Program
from headinfer.attend.triton_merge import merge_slots
from headinfer.attend.work import Kernel, TokenWork, Total, Work

MAX_ROWS = 64
"""Query rows of one KV head up to which a step is bound by reading keys and values."""

_SLOTS_BYTES = 8 * 2**20
"""Partials kept until they are merged, where one tile's take no more: 500 for Llama-3-8B."""

_LEAST_BLOCK_ROWS = 16
"""Rows of a matrix product at least, and `decode_token` serves no more. In float32 and the largest
head_dim, more take more of a multiprocessor's memory than cards of consumers have."""

_MIN_SPLIT_TOKENS = 256
_PROGRAMS_PER_MULTIPROCESSOR = 2
_BLOCK_SLOTS = 32

_BLOCK_BYTES = 2**14
"""Keys that a program reads at once, twice that in flight with the values."""

_ATTEND = Program(attend_tile, num_warps=4, num_stages=2)
_MERGE = Program(merge_slots, num_warps=4)


class _Decode(NamedTuple):
    """A way of launching `decode_token`.

    Attributes:
        program: with the stages of loads in flight.
        block_bytes: keys that a program reads at once.
        programs: for each multiprocessor.
        least_tokens: of a part, into which tokens are divided.
    """

    program: Program
    block_bytes: int
    programs: int
    least_tokens: int


_SHARED_BYTES = 200 * 2**10
"""Memory of a multiprocessor for one program that data centres' GPUs have, and others do not."""

_SMALL = _Decode(Program(decode_token, num_warps=4, num_stages=2), _BLOCK_BYTES, 2, 256)
_LARGE = _Decode(Program(decode_token, num_warps=4, num_stages=3), 2 * _BLOCK_BYTES, 1, 128)
"""Measured on an H100, a layer of Llama-3-8B: at 40K tokens 69 us, and 77 as `_SMALL`; at 1K 10 us
and 16."""


def serves(dtype: torch.dtype, head_dim: int) -> bool:
    """Whether the programs are made for keys and values of this dtype and head_dim."""
    return dtype in (torch.float32, torch.float16, torch.bfloat16) and 16 <= head_dim <= 256


def _power_of_2(number: int) -> int:
    """Return the least power of 2 that is not below a number."""
    return 1 << (number - 1).bit_length()


@functools.lru_cache(1024)  # asked for each tile
def _block_tokens(dim: int, itemsize: int, block_bytes: int = _BLOCK_BYTES) -> int:
    """Return the tokens read at once."""
    return max(block_bytes // (_power_of_2(dim) * itemsize), 16)


@functools.lru_cache(1024)
def _merged_slots(group: int, dim: int) -> int:
    """Return how many partials of all rows are merged at once: 64 KiB of outputs."""
    return max(min(2**14 // (_power_of_2(group) * _power_of_2(dim)), _BLOCK_SLOTS), 1)


@functools.lru_cache(1024)
def _split(
    kv_len: int, block_tokens: int, most_splits: int, least_tokens: int = _MIN_SPLIT_TOKENS
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
        self.block_rows = max(_power_of_2(self.rows), _LEAST_BLOCK_ROWS)
        self.block_dim = _power_of_2(dim)
        self.block_tokens = _block_tokens(dim, query.dtype.itemsize)
        self.most_splits = max(programs // self.heads, 1)
        self._all_rows = self.heads * self.rows
        slot_elements = self._all_rows * (dim + 1)
        slot_bytes = slot_elements * torch.float32.itemsize
        self.capacity = max(_SLOTS_BYTES // slot_bytes, self.most_splits + 1)
        self.slots = query.new_empty(self.capacity * slot_elements, dtype=torch.float32)
        self.used = 0

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
                *(_BLOCK_SLOTS, self.block_dim),
            ),
        )


class TritonDecode:
    """A kernel for few query rows: each tile by one launch, into `Slots`.

    Args:
        programs: programs that fill the device.
    """

    name = "Triton decode"

    def __init__(self, programs: int) -> None:
        self._programs = programs

    def serves(self, work: Work) -> bool:
        """Whether it can attend a work: not where its queries differ in what they see."""
        group, q_len = work.query.shape[2:4]
        if not 0 < group * q_len <= MAX_ROWS or (work.causal and q_len > 1):
            return False
        return work.mask is None or work.mask.shape[1] == 1

    def attend(self, work: Work) -> None:
        """Attend each tile; see `Kernel.attend`."""
        into, mask = work.into, work.mask
        assert into is not None
        slots = into if isinstance(into, Slots) else Slots(work.query, work.scale, self._programs)
        query = slots.query
        batch, kv_heads, _, _, dim = query.shape
        constants = (dim, mask is not None, slots.block_rows, slots.block_dim, slots.block_tokens)
        for tile in work.tiles:
            if not tile.tokens:
                continue
            splits, split_tokens = _split(tile.tokens, slots.block_tokens, slots.most_splits)
            if slots.used + splits > slots.capacity:
                slots.make_room()
            keys, values = tile.whole
            batch_stride, head_stride, token_stride, step = keys.stride()
            start = (tile.heads.start or 0) * head_stride + tile.first * token_stride
            if step != 1 or values.stride() != keys.stride():  # the program reads them alike
                keys, values = (part.contiguous() for part in tile.kv)
                batch_stride, head_stride, token_stride, _ = keys.stride()
                start = 0
            seen = query
            if mask is not None:
                seen = mask.expand(batch, 1, tile.tokens).contiguous()
            _ATTEND.launch(
                (splits, slots.heads, 1),
                (query, keys, values, seen, slots.slots),
                (
                    *(slots.scale, tile.tokens, split_tokens, slots.used),
                    *(kv_heads, slots.rows, slots.capacity),
                ),
                (start, batch_stride, head_stride, token_stride),
                constants,
            )
            slots.used += splits
        if slots is not into:
            into.add(slots.result())


class TritonKernels(Kernels):
    """A table whose few query rows are attended by Triton, and whose partials it merges.

    Args:
        kernels: what attends more rows and causal squares, best first.
        rest: what attends the works that none of these serves.
        multiprocessors: of the device.
        shared_bytes: memory of a multiprocessor that one program may have.
    """

    def __init__(
        self,
        kernels: Sequence[Kernel],
        rest: Sequence[Kernel],
        multiprocessors: int,
        shared_bytes: int = 0,
    ) -> None:
        self._programs = _PROGRAMS_PER_MULTIPROCESSOR * multiprocessors
        self._decode = _LARGE if shared_bytes >= _SHARED_BYTES else _SMALL
        self._decode_programs = self._decode.programs * multiprocessors
        super().__init__([TritonDecode(self._programs), *kernels], rest)
        self._scratch: dict[tuple[object, ...], tuple[torch.Tensor, torch.Tensor]] = {}

    def begin(self, query: torch.Tensor, *, scale: float) -> Total:
        """Return what collects the partials of some queries; see `Kernels.begin`."""
        if 0 < query.shape[2] * query.shape[3] <= MAX_ROWS:
            return Slots(query, scale, self._programs)
        return FusedAccumulator()

    def decode(self, work: TokenWork) -> None:
        """Attend and keep one new token in one launch, where layouts allow."""
        (new_keys, new_values), out, tile, place = work.new, work.out, work.tile, work.place
        query, (keys, values) = work.query.contiguous(), tile.whole
        batch, kv_heads, group, _, dim = query.shape
        batch_stride, head_stride, token_stride, step = keys.stride()
        alike = step == 1 and values.stride() == keys.stride() and out.is_contiguous()
        if group > _LEAST_BLOCK_ROWS or not alike:
            super().decode(work)
            return
        if new_keys.stride() != new_values.stride() or new_keys.stride(3) != 1:
            new_keys, new_values = new_keys.contiguous(), new_values.contiguous()
        way, heads = self._decode, batch * kv_heads
        block_tokens = _block_tokens(dim, keys.itemsize, way.block_bytes)
        most_splits = max(self._decode_programs // heads, 1)
        splits, start = most_splits, (tile.heads.start or 0) * head_stride
        sink_tokens = work.sink_tokens
        seen_tokens, gap = tile.tokens + sink_tokens, tile.first - sink_tokens
        if place is None:
            splits, _ = _split(seen_tokens, block_tokens, most_splits, way.least_tokens)
            start += 0 if sink_tokens else tile.first * token_stride
        scratch_elements = most_splits * heads * group * (dim + 1)
        if place is None:
            parts, arrived = self._scratch_of(query, scratch_elements, heads)
        else:
            assert work.counters is not None
            parts, arrived = query.new_empty(scratch_elements, dtype=torch.float32), work.counters
        sinks = parts if work.sinks is None else work.sinks.contiguous()
        way.program.launch(
            (splits, heads, 1),
            (
                *(query, new_keys, new_values, keys, values, parts, arrived, out),
                *(sinks, arrived if place is None else place),
            ),
            (float(work.scale), seen_tokens, most_splits, kv_heads, sink_tokens, gap),
            (*new_keys.stride()[:2], start, batch_stride, head_stride, token_stride),
            (
                *(group, dim, work.sinks is not None, place is not None, sink_tokens > 0),
                *(_LEAST_BLOCK_ROWS, _power_of_2(dim), block_tokens),
                *(_power_of_2(group), _merged_slots(group, dim), way.least_tokens),
            ),
        )

    def _scratch_of(
        self, query: torch.Tensor, elements: int, heads: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return memory for partials, and zeros to count with; each stream has its own.

        Launches on one stream run one after another, and each leaves the zeros as they were.
        """
        device = query.device
        stream = torch.cuda.current_stream(device.index).cuda_stream if query.is_cuda else 0
        scratch = self._scratch.get((device, stream))
        if scratch is None or scratch[0].numel() < elements or scratch[1].numel() < heads:
            parts = torch.empty(elements, dtype=torch.float32, device=device)
            scratch = parts, torch.zeros(heads, dtype=torch.int32, device=device)
            self._scratch[device, stream] = scratch
        return scratch
