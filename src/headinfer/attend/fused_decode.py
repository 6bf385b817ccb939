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
from headinfer.attend.slots import (
    BLOCK_BYTES,
    BLOCK_SLOTS,
    LEAST_BLOCK_ROWS,
    MIN_SPLIT_TOKENS,
    Slots,
    block_tokens_of,
    split,
)
from headinfer.attend.table import Kernels
from headinfer.attend.triton_kernels import attend_tile, decode_token
from headinfer.attend.work import Kernel, TokenWork, Total, Work
from headinfer.device.base import PlaceError
from headinfer.native.triton_launch import Program, power_of_2

MAX_ROWS = 64
"""Query rows of one KV head up to which a step is bound by reading keys and values."""

_PROGRAMS_PER_MULTIPROCESSOR = 2

_ATTEND = Program(attend_tile, num_warps=4, num_stages=2)


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

_SMALL = _Decode(Program(decode_token, num_warps=4, num_stages=2), BLOCK_BYTES, 2, 256)
_LARGE = _Decode(Program(decode_token, num_warps=4, num_stages=3), 2 * BLOCK_BYTES, 1, 128)
"""Measured on an H100, a layer of Llama-3-8B: at 40K tokens 69 us, and 77 as `_SMALL`; at 1K 10 us
and 16."""


def serves(dtype: torch.dtype, head_dim: int) -> bool:
    """Whether the programs are made for keys and values of this dtype and head_dim."""
    return dtype in (torch.float32, torch.float16, torch.bfloat16) and 16 <= head_dim <= 256


@functools.lru_cache(1024)
def _merged_slots(group: int, dim: int) -> int:
    """Return how many partials of all rows are merged at once: 64 KiB of outputs."""
    return max(min(2**14 // (power_of_2(group) * power_of_2(dim)), BLOCK_SLOTS), 1)


class TritonDecode:
    """A kernel for few query rows: each tile by one launch, into `Slots`.

    Args:
        programs: programs that fill the device.
        softcap: bound of the scores, or None.
    """

    name = "Triton decode"

    def __init__(self, programs: int, softcap: float | None = None) -> None:
        self._programs = programs
        self._cap = float(softcap or 0.0)

    def serves(self, work: Work) -> bool:
        """Whether it can attend a work: not where its queries differ in what they see."""
        group, q_len = work.query.shape[2:4]
        if not 0 < group * q_len <= MAX_ROWS or (work.causal and q_len > 1):
            return False
        return work.mask is None or work.mask.shape[1] == 1

    def square(self, _work: Work) -> None:
        """Return None: it is no operator of torch's."""

    def attend(self, work: Work) -> None:
        """Attend each tile; see `Kernel.attend`."""
        into, mask = work.into, work.mask
        assert into is not None
        slots = into if isinstance(into, Slots) else Slots(work.query, work.scale, self._programs)
        query = slots.query
        batch, kv_heads, _, _, dim = query.shape
        blocks = slots.block_rows, slots.block_dim, slots.block_tokens
        constants = (dim, mask is not None, False, self._cap, *blocks, MIN_SPLIT_TOKENS)
        for tile in work.tiles:
            if not tile.tokens:
                continue
            splits, split_tokens = split(tile.tokens, slots.block_tokens, slots.most_splits)
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
                (query, keys, values, seen, query, slots.slots),
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
        softcap: bound of the scores, which all these kernels heed; None for none.
    """

    def __init__(
        self,
        kernels: Sequence[Kernel],
        rest: Sequence[Kernel],
        multiprocessors: int,
        shared_bytes: int = 0,
        softcap: float | None = None,
    ) -> None:
        self._cap = float(softcap or 0.0)
        self._programs = _PROGRAMS_PER_MULTIPROCESSOR * multiprocessors
        self._decode = _LARGE if shared_bytes >= _SHARED_BYTES else _SMALL
        self._decode_programs = self._decode.programs * multiprocessors
        super().__init__([TritonDecode(self._programs, softcap), *kernels], rest)
        self._scratch: dict[tuple[object, ...], tuple[torch.Tensor, torch.Tensor]] = {}

    def begin(self, query: torch.Tensor, *, scale: float) -> Total:
        """Return what collects the partials of some queries; see `Kernels.begin`."""
        if 0 < query.shape[2] * query.shape[3] <= MAX_ROWS:
            return Slots(query, scale, self._programs)
        return FusedAccumulator()

    def attend_counted(self, work: Work) -> None:
        """Attend a tile by one launch that reads its number of tokens from memory.

        It takes slots for all tokens there may be. Those left without any add nothing to a merge,
        whose order they do not change where they are the last ones.
        """
        (tile,), slots = work.tiles, work.into
        keys, values = tile.whole
        alike = keys.stride() == values.stride() and keys.stride(3) == 1
        if not isinstance(slots, Slots) or not alike or tile.counted is None:
            super().attend_counted(work)
            return
        splits = max(min(slots.most_splits, tile.tokens // MIN_SPLIT_TOKENS), 1)
        if slots.used + splits > slots.capacity:
            raise PlaceError("its attention has more partials than are merged at once")
        batch_stride, head_stride, token_stride, _ = keys.stride()
        start = (tile.heads.start or 0) * head_stride + tile.first * token_stride
        query = slots.query
        _ATTEND.launch(
            (splits, slots.heads, 1),
            (query, keys, values, query, tile.counted, slots.slots),
            (
                *(slots.scale, tile.tokens, tile.tokens, slots.used),
                *(query.shape[1], slots.rows, slots.capacity),
            ),
            (start, batch_stride, head_stride, token_stride),
            (
                *(query.shape[4], False, True, self._cap, slots.block_rows),
                *(slots.block_dim, slots.block_tokens, MIN_SPLIT_TOKENS),
            ),
        )
        slots.used += splits

    def decode(self, work: TokenWork) -> None:
        """Attend and keep one new token in one launch, where layouts allow."""
        (new_keys, new_values), out, tile, place = work.new, work.out, work.tile, work.place
        query, (keys, values) = work.query.contiguous(), tile.whole
        batch, kv_heads, group, _, dim = query.shape
        batch_stride, head_stride, token_stride, step = keys.stride()
        alike = step == 1 and values.stride() == keys.stride() and out.is_contiguous()
        if group > LEAST_BLOCK_ROWS or not alike:
            super().decode(work)
            return
        if new_keys.stride() != new_values.stride() or new_keys.stride(3) != 1:
            new_keys, new_values = new_keys.contiguous(), new_values.contiguous()
        way, heads = self._decode, batch * kv_heads
        block_tokens = block_tokens_of(dim, keys.itemsize, way.block_bytes)
        most_splits = max(self._decode_programs // heads, 1)
        splits, start = most_splits, (tile.heads.start or 0) * head_stride
        sink_tokens = work.sink_tokens
        seen_tokens, gap = tile.tokens + sink_tokens, tile.first - sink_tokens
        if place is None:
            splits, _ = split(seen_tokens, block_tokens, most_splits, way.least_tokens)
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
                *(self._cap, LEAST_BLOCK_ROWS, power_of_2(dim), block_tokens),
                *(power_of_2(group), _merged_slots(group, dim), way.least_tokens),
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
