"""Chunks with bounded scores (Gemma 2) on CUDA: tiles, squares, windows and masks, by one program.

None of torch's operators bounds scores. Its FlexAttention does, where its compiler has made a
kernel of it. That takes seconds for each kind of work in each process, and cannot be tried or even
compiled without a GPU.

Without a kernel of its own such a chunk is attended by the reference, in blocks of float32.

Counted for a chunk of 8K tokens behind 312K in Gemma-2-9B: 2.7 million launches, 78 TB read and
written, 901 Tflop in float32. On an H100 a run with it did not end in 110 s.
"""

from typing import NamedTuple

import torch

from headinfer.attend.partial import Partial
from headinfer.attend.triton_chunk import attend_chunk
from headinfer.attend.work import Work, tile_in_hand
from headinfer.kv.extent import Tile
from headinfer.kv.pair import KV
from headinfer.native.triton_launch import Program, power_of_2

LEAST_SPLIT_TOKENS = 1024
_MOST_SPLITS = 16
_16_BITS = 2
_MASK_BYTES = 4
"""Bytes in flight for each element of a mask, as compiled for several cards."""


class Blocks(NamedTuple):
    """A division of the work among programs.

    Attributes:
        rows: queries of a program.
        tokens: keys that it reads at once.
        num_warps: of a program.
        num_stages: blocks of keys and values in flight.
    """

    rows: int
    tokens: int
    num_warps: int
    num_stages: int

    def shared_bytes(self, block_dim: int, *, masked: bool) -> int:
        """Memory of a multiprocessor that a program takes at most, in 16 bits."""
        kv_bytes = (self.rows + 2 * self.num_stages * self.tokens) * block_dim * _16_BITS
        return kv_bytes + masked * self.rows * self.tokens * _MASK_BYTES


_LARGE_BLOCKS = (Blocks(128, 64, 8, 3), Blocks(128, 64, 8, 2))
_BLOCKS = (Blocks(128, 32, 8, 2), Blocks(64, 32, 4, 2), Blocks(32, 16, 4, 2))
"""Best first; a card takes the first for which a multiprocessor has the memory. With masks, which
take registers, the large ones would spill."""

_SPARE_BYTES = 2048
"""Shared memory that a compiler takes beside: for maxima and sums of rows."""


def blocks_of(dim: int, shared_bytes: int, *, masked: bool = False) -> Blocks:
    """Return the division for a head_dim on a card whose programs may have so much memory."""
    block_dim = power_of_2(dim)
    for blocks in _BLOCKS if masked else _LARGE_BLOCKS + _BLOCKS:
        if blocks.shared_bytes(block_dim, masked=masked) + _SPARE_BYTES <= shared_bytes:
            return blocks
    return _BLOCKS[-1]


class _Way(NamedTuple):
    """A program, and how it divides the work."""

    blocks: Blocks
    program: Program


def _way(blocks: Blocks) -> _Way:
    options = {"num_warps": blocks.num_warps, "num_stages": blocks.num_stages}
    return _Way(blocks, Program(attend_chunk, **options))


class TritonChunks:
    """A kernel for many query rows in 16 bits, with bounded scores or without; serves all masks.

    Args:
        dim: of keys and values.
        multiprocessors: of the device.
        shared_bytes: memory of a multiprocessor that one program may have.
        softcap: bound of the scores, or None.
    """

    name = "Triton chunks"

    def __init__(
        self, dim: int, multiprocessors: int, shared_bytes: int, softcap: float | None
    ) -> None:
        self._programs = multiprocessors
        self._cap = float(softcap or 0.0)
        self._plain = _way(blocks_of(dim, shared_bytes))
        self._masked = _way(blocks_of(dim, shared_bytes, masked=True))

    @classmethod
    def on(cls, torch_device: torch.device, dim: int, softcap: float | None) -> "TritonChunks":
        """Return the kernel for a GPU."""
        properties = torch.cuda.get_device_properties(torch_device)
        shared_bytes = getattr(properties, "shared_memory_per_block_optin", 0)  # ROCm has none
        return cls(dim, properties.multi_processor_count, shared_bytes, softcap)

    def serves(self, work: Work) -> bool:
        """Whether it can attend a work: wherever there are queries."""
        return work.query.shape[3] > 0

    def square(self, _work: Work) -> None:
        """Return None: it is no operator of torch's."""

    def attend(self, work: Work) -> None:
        """Attend each tile; see `Kernel.attend`."""
        assert work.into is not None
        for tile in work.tiles:
            if tile.tokens:
                for partial in self._attend(
                    work.query, tile, work.scale, causal=work.causal, mask=work.mask
                ):
                    work.into.add(partial)

    def band(self, query: torch.Tensor, kv: KV, scale: float, window_tokens: int) -> Partial:
        """Attend within a window; see `headinfer.attend.band.Band`."""
        (partial,) = self._attend(
            query, tile_in_hand(kv), scale, causal=True, window_tokens=window_tokens
        )
        return partial

    def _attend(
        self,
        query: torch.Tensor,
        tile: Tile,
        scale: float,
        *,
        causal: bool = False,
        window_tokens: int = 0,
        mask: torch.Tensor | None = None,
    ) -> list[Partial]:
        """Attend one tile, whose last token is the last query's own with `causal`.

        Where there are too few queries to fill the device, the tokens are divided into parts.
        """
        batch, kv_heads, group, q_len, dim = query.shape
        query = query if query.stride(4) == 1 else query.contiguous()
        keys, values = tile.whole
        start = (tile.heads.start or 0) * keys.stride(1) + tile.first * keys.stride(2)
        if keys.stride(3) != 1 or values.stride() != keys.stride():  # the program reads them alike
            keys, values = (part.contiguous() for part in tile.kv)
            start = 0
        way, all_heads = self._plain if mask is None else self._masked, batch * kv_heads * group
        blocks = way.blocks
        programs = -(-q_len // blocks.rows) * all_heads
        splits = 1
        if not causal:
            most = min(self._programs // programs, _MOST_SPLITS)
            splits = max(min(most, tile.tokens // LEAST_SPLIT_TOKENS), 1)
        split_tokens = -(-tile.tokens // (splits * blocks.tokens)) * blocks.tokens
        splits = -(-tile.tokens // split_tokens)
        seen: torch.Tensor = query
        mask_strides: tuple[int, ...] = (0, 0)
        if mask is not None:
            seen = mask if mask.stride(2) == 1 else mask.contiguous()
            sizes = zip(seen.shape[:2], seen.stride()[:2], strict=True)
            mask_strides = tuple(stride if size > 1 else 0 for size, stride in sizes)
        out = query.new_empty(splits, *query.shape)
        lses = query.new_empty(splits, *query.shape[:4], dtype=torch.float32)
        way.program.launch(
            (-(-q_len // blocks.rows), all_heads, splits),
            (query, keys, values, seen, out, lses),
            (
                *(float(scale), kv_heads, group, q_len, tile.tokens, split_tokens),
                *(tile.tokens - q_len, window_tokens),
            ),
            (*query.stride()[:4], start, *keys.stride()[:3], *mask_strides),
            (
                *(dim, causal, window_tokens > 0, mask is not None, self._cap),
                *(blocks.rows, power_of_2(dim), blocks.tokens),
            ),
        )
        return [Partial(out[split], lses[split]) for split in range(splits)]
