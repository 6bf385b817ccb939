"""Decode on CUDA: one launch for each tile and one that merges all of them, or one for all of it.

With torch's kernel a tile takes some 35 launches, most of them to merge: on an H100 whose host
needs 25 us for a launch that was a millisecond for each tile, longer than its copy takes. Where all
tokens are resident, a single launch also keeps the new one.
"""

import torch

from headinfer.attend.fused_merge import MergedTiles
from headinfer.attend.partial import Kernel, Partial, TileAttention
from headinfer.attend.triton_kernels import attend_tile, decode_token, merge_slots
from headinfer.attend.triton_launch import Program

MAX_ROWS = 64
"""Query rows of one KV head up to which a step is bound by reading keys and values."""

_SLOTS_BYTES = 8 * 2**20
"""Of partials kept until they are merged, where one tile's take no more: 500 for Llama-3-8B."""

_LEAST_BLOCK_ROWS = 16
"""Rows of a matrix product at least; more take more of a multiprocessor's memory than cards of
consumers have, in float32 and the largest head_dim, and `decode_token` serves no more."""

_MIN_SPLIT_TOKENS = 256
_PROGRAMS_PER_MULTIPROCESSOR = 2
_BLOCK_SLOTS = 32

_ATTEND = Program(attend_tile, num_warps=4, num_stages=2)
_DECODE = Program(decode_token, num_warps=4, num_stages=2)
_MERGE = Program(merge_slots, num_warps=4)


def serves(dtype: torch.dtype, head_dim: int) -> bool:
    """Whether the programs are made for keys and values of this dtype and head_dim."""
    return dtype in (torch.float32, torch.float16, torch.bfloat16) and 16 <= head_dim <= 256


def _power_of_2(number: int) -> int:
    """Return the least power of 2 that is not below a number."""
    return 1 << (number - 1).bit_length()


def _block_tokens(keys: torch.Tensor) -> int:
    """Return the tokens read at once: 16 KiB of keys, twice that in flight with the values."""
    return max(2**14 // (_power_of_2(keys.shape[3]) * keys.itemsize), 16)


def _split(kv_len: int, block_tokens: int, most_splits: int) -> tuple[int, int]:
    """Return into how many parts some tokens are split, of whole blocks, and the tokens of each."""
    splits = max(min(most_splits, kv_len // _MIN_SPLIT_TOKENS), 1)
    blocks = -(-kv_len // block_tokens)
    split_tokens = -(-blocks // splits) * block_tokens
    return -(-kv_len // split_tokens), split_tokens


def _are_alike(keys: torch.Tensor, values: torch.Tensor) -> bool:
    """Whether keys and values have equal strides, the last of them 1."""
    return keys.stride() == values.stride() and keys.stride(3) == 1


def _alike(keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return keys and values that are alike, copied where they are not."""
    return (keys, values) if _are_alike(keys, values) else (keys.contiguous(), values.contiguous())


class FusedDecodeKernel(Kernel):
    """Few query rows by Triton; all else by another kernel.

    Args:
        other: what serves more rows, causal squares and masks that differ between queries.
        multiprocessors: of the device.
    """

    def __init__(self, other: Kernel, multiprocessors: int) -> None:
        self._other = other
        self._programs = _PROGRAMS_PER_MULTIPROCESSOR * multiprocessors
        self._scratch: dict[tuple[object, ...], tuple[torch.Tensor, torch.Tensor]] = {}

    @property
    def name(self) -> str:  # type: ignore[override]  # follows the other's
        """What to call it."""
        return f"Triton decode and {self._other.name}"

    def begin(self, query: torch.Tensor, *, scale: float) -> TileAttention:
        """Return the attention of some queries to a set of tiles; see `Kernel.begin`."""
        if 0 < query.shape[2] * query.shape[3] <= MAX_ROWS:
            return FusedTiles(query, scale, self._programs)
        return MergedTiles(self._other, query, scale)

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

    def decode(
        self,
        query: torch.Tensor,
        new: tuple[torch.Tensor, torch.Tensor],
        past: tuple[torch.Tensor, torch.Tensor],
        out: torch.Tensor,
        *,
        scale: float,
    ) -> None:
        """Attend and keep one new token in one launch; see `Kernel.decode`."""
        keys, values = past
        batch, kv_heads, group, _, dim = query.shape
        readable = _are_alike(keys, values) and out.is_contiguous()
        if group > _LEAST_BLOCK_ROWS or not readable:
            super().decode(query, new, past, out, scale=scale)
            return
        query, (new_keys, new_values) = query.contiguous(), _alike(*new)
        kv_len, heads, block_tokens = keys.shape[2], batch * kv_heads, _block_tokens(keys)
        splits, split_tokens = _split(kv_len, block_tokens, max(self._programs // heads, 1))
        parts, arrived = self._scratch_of(query, splits * heads * group * (dim + 1), heads)
        _DECODE.launch(
            (splits, heads, 1),
            (query, new_keys, new_values, keys, values, parts, arrived, out),
            (float(scale), kv_len, split_tokens, kv_heads, group),
            (*new_keys.stride()[:2], *keys.stride()[:3]),
            (dim, _LEAST_BLOCK_ROWS, _power_of_2(dim), block_tokens, _BLOCK_SLOTS),
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
        self._more: Partial | None = None  # merged from where it lies
        self._sinks: torch.Tensor | None = None

    def attend(
        self, keys: torch.Tensor, values: torch.Tensor, *, mask: torch.Tensor | None = None
    ) -> None:
        """Attend a tile, of which `mask[batch or 1, 1, kv_len]` tokens are visible."""
        kv_len = keys.shape[2]
        if not kv_len:
            return
        query, block_tokens = self._query, _block_tokens(keys)
        splits, split_tokens = _split(kv_len, block_tokens, self._most_splits)
        self._make_room(splits)
        keys, values = _alike(keys, values)
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
                max(_power_of_2(rows), _LEAST_BLOCK_ROWS),
                self._block_dim,
                block_tokens,
            ),
        )
        self._used += splits

    def add(self, partial: Partial) -> None:
        """Merge a partial of the same queries; the first must stay as it is until the end."""
        out, lse = partial.out, partial.lse
        in_place = out.dtype == torch.float32 and out.is_contiguous() and lse.is_contiguous()
        if self._more is None and in_place:
            self._more = partial
            return
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
            self._more = merged

    def _merge(self, out: torch.Tensor, lse: torch.Tensor | None) -> None:
        """Merge all slots into `out[batch, kv_heads, group, q_len, dim]`, and into `lse` if any."""
        _, kv_heads, group, q_len, dim = self._query.shape
        more = self._more
        _MERGE.launch(
            (self._rows, 1, 1),
            (
                self._slots,
                *((more.out, more.lse) if more is not None else (self._slots, self._slots)),
                self._slots if self._sinks is None else self._sinks,
                out,
                self._slots if lse is None else lse,
            ),
            (self._used, self._capacity, kv_heads, group, q_len),
            out.stride()[:4],
            (
                dim,
                more is not None,
                self._sinks is not None,
                lse is not None,
                _BLOCK_SLOTS,
                self._block_dim,
            ),
        )
