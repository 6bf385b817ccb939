"""Partial attention on CUDA by fused kernels, which return the LSE.

For large tiles cuDNN's on Hopper and later, else flash attention, in float32 memory-efficient
attention; all are called through torch's private operators. For few rows, where reading
keys and values is the bound, Triton programs of our own (`fused_decode`), and flash attention where
there is no Triton. Bounded scores are served by Triton alone (`fused_chunk` for many rows).
"""

import contextlib
import logging

import torch

from headinfer.attend.fused_call import (
    FusedCall,
    attend_grouped,
    attend_shared,
    attend_split,
    operator,
)
from headinfer.attend.recurring import (
    attend_recurring,
    attend_recurring_square,
    cut_in_powers,
    folded_queries,
)
from headinfer.attend.reference import ReferenceKernel
from headinfer.attend.table import Kernels
from headinfer.attend.verdict import agrees_here
from headinfer.attend.work import Kernel, Total, Work
from headinfer.kv.extent import Tile

_logger = logging.getLogger(__name__)

_FEW_ROWS = 64
"""Up to so many folded query rows a flash kernel runs one thread block a head."""

_MIN_SPLIT_TOKENS = 256
_BLOCKS_PER_MULTIPROCESSOR = 2
_HOPPER = 9
"""Major compute capability from which cuDNN's kernels are the fastest.

Measured on an H100: cuDNN did a tile at 690 TFLOP/s and a causal square at 620, flash attention 2
at 360 and 320.
"""

_CUDNN_PAIRS = 2**28
"""Query rows x keys of one head from which cuDNN is worth its preparation, for every new shape.

Measured: it took 45 to 65 ms. It then saves 32 layers of 8 heads as long, with so many pairs in a
tile or twice that in a causal square. The shapes of squares come again from prompt to prompt.
"""

_FEWER_IN_CHUNKS = 2
"""By how much fewer pairs are worth it where the queries are as many as those of other chunks."""

_FEWER_IN_SQUARES = 4
"""The same of a causal square, if with the tokens before it there are enough pairs."""

_MORE_IN_LONE_SQUARES = 1.5
"""By how much more pairs a causal square is worth it whose length may never come again.

Measured on an H100 at 10,240 tokens: a prompt's 32 squares took 49 ms by cuDNN, and 93 by flash
attention. The first such prompt saves what preparing takes.
"""

_FEWER_IN_CUTS = 8
"""The same of the shortest stretch that is cut from a tile which is worth it."""

_LEAST_CUT_TOKENS = 2
"""Tokens of such a stretch, at least: cuDNN takes no single key."""

_FLASH, _FLASH_CAUSAL = (
    operator("flash_attention", is_causal=causal, return_debug_mask=False)
    for causal in (False, True)
)
_CUDNN, _CUDNN_CAUSAL = (
    operator("cudnn_attention", attn_bias=None, compute_log_sumexp=True, is_causal=causal)
    for causal in (False, True)
)
_EFFICIENT, _EFFICIENT_CAUSAL = (
    operator("efficient_attention", attn_bias=None, compute_log_sumexp=True, is_causal=causal)
    for causal in (False, True)
)


class CudaKernel:
    """A kernel of torch's for CUDA, for tiles and causal squares without masks.

    With `least_pairs` it has to prepare for every new shape, and serves where that is worth it. It
    is loaded, and checked, when the first such work comes: for cuDNN that took 1.5 s, which no
    short prompt is to wait for. Once it failed its check it serves nothing, and has no name.

    Args:
        name: what to call it.
        torch_device: which GPU.
        tile: its operator for tiles.
        square: the operator with a causal mask.
        small: the operator for tiles of few query rows, of a single key, or of less than
            `least_pairs`; by default that for all tiles.
        least_pairs: query rows x keys of one head from which a tile is worth it.
        knows_groups: whether `square` takes fewer KV heads than query heads.
    """

    def __init__(
        self,
        name: str,
        torch_device: torch.device,
        *,
        tile: FusedCall,
        square: FusedCall,
        small: FusedCall | None = None,
        least_pairs: int = 0,
        knows_groups: bool = False,
    ) -> None:
        self.name = name
        self._tile, self._square, self._small = tile, square, small or tile
        self._knows_groups = knows_groups
        self._torch_device = torch_device
        self._least_pairs = least_pairs
        self._works = None if least_pairs else True  # None is not known yet
        properties = torch.cuda.get_device_properties(torch_device)
        self._blocks = _BLOCKS_PER_MULTIPROCESSOR * properties.multi_processor_count

    def serves(self, work: Work) -> bool:
        """Whether it can attend a work, and one of the tiles is worth it."""
        group, q_len = work.query.shape[2:4]
        if work.mask is not None or not q_len or self._works is False:
            return False
        if not self._least_pairs:
            return True
        if work.causal:
            if not self._is_worth_it_in_square(group, q_len, work.past_tokens):
                return False
        elif not any(self._is_worth_it(group, q_len, tile.tokens) for tile in work.tiles):
            return False
        return self._works or self._check(work.query)

    def _is_worth_it_in_square(self, group: int, q_len: int, past_tokens: int) -> bool:
        """Whether a causal square is worth it, at such a place in a prompt."""
        least, pairs = self._least_pairs, group * q_len * q_len
        if not _is_of_a_chunk(q_len):  # a whole prompt, or the end of one
            return pairs >= _MORE_IN_LONE_SQUARES * least
        enough = group * q_len * (past_tokens + q_len) >= least
        return enough and pairs >= least // _FEWER_IN_SQUARES

    def _is_worth_it(self, group: int, q_len: int, tokens: int) -> bool:
        """Whether a tile is worth what its shapes have to be prepared for."""
        fewer = _FEWER_IN_CHUNKS if _is_of_a_chunk(q_len) else 1
        return group * q_len * tokens >= self._least_pairs // fewer

    def square(self, work: Work) -> FusedCall | None:
        """Return its causal operator, where that takes all heads as they are."""
        return self._square if self._knows_groups else None

    def attend(self, work: Work) -> None:
        """Attend each tile in one fused call; see `Kernel.attend`."""
        query, scale, into = work.query, work.scale, work.into
        assert into is not None
        batch, kv_heads, group, q_len, _ = query.shape
        if work.causal and q_len > 1:
            square, kv = self._square, work.tiles[0].kv
            if self._least_pairs:
                alike = folded_queries(query, into).unflatten(2, (group, q_len))
                into.add(attend_recurring_square(square, alike, kv, scale))
            else:
                attend_square = attend_shared if self._knows_groups else attend_grouped
                into.add(attend_square(square, query, *kv, scale))
            return
        folded, rows = folded_queries(query, into), group * q_len
        few = rows <= _FEW_ROWS
        most_splits = self._blocks // kv_heads if few and batch == 1 else 1
        for tile in work.tiles:
            if self._least_pairs and not few and self._is_worth_it(group, q_len, tile.tokens):
                self._attend_cut(folded, tile, scale, group, into)
            elif tokens := tile.tokens:
                call = self._small if few or tokens == 1 or self._least_pairs else self._tile
                splits = min(most_splits, tokens // _MIN_SPLIT_TOKENS)
                into.add(attend_split(call, folded, *tile.kv, scale, splits, group))

    def _attend_cut(
        self, folded: torch.Tensor, tile: Tile, scale: float, group: int, into: Total
    ) -> None:
        """Attend a tile in stretches that come again; what is left of it by the other operator."""
        pairs = self._least_pairs // _FEWER_IN_CUTS
        least = max(pairs // folded.shape[2], _LEAST_CUT_TOKENS)
        least = 1 << (least - 1).bit_length()  # or stretches between it and a power were no power
        for tokens in cut_in_powers(tile.tokens, least):
            kv, number = tile.kv.cut(tokens), tokens.stop - tokens.start
            if number >= least:
                into.add(attend_recurring(self._tile, folded, kv, scale, group))
            else:
                into.add(attend_split(self._small, folded, *kv, scale, 1, group))

    def _check(self, query: torch.Tensor) -> bool:
        """Find out whether it works, with a kernel of its operators that serves all works."""
        tile, square, small = self._tile, self._square, self._small
        every = CudaKernel(self.name, self._torch_device, tile=tile, square=square, small=small)
        self._works = agrees_here(Kernels([every]), query.device, query.dtype, query.shape[4])
        if not self._works:
            _logger.warning("%s fails its check here; another kernel is used", self.name)
            self.name = ""
        return self._works


def _is_of_a_chunk(q_len: int) -> bool:
    """Whether so many queries come again: the plan's chunks are powers of two."""
    return q_len.bit_count() == 1


def candidates(
    torch_device: torch.device, dtype: torch.dtype, head_dim: int, softcap: float | None = None
) -> list[Kernels]:
    """Return the tables that may serve this dtype and head_dim, best first.

    Args:
        torch_device: which GPU.
        dtype: of queries, keys and values.
        head_dim: elements of one key, and of one value.
        softcap: bound of the scores, or None.
    """
    half = dtype in (torch.float16, torch.bfloat16)
    if head_dim % 8 or not (half or dtype == torch.float32):
        return []
    if softcap is not None:
        return _capped(torch_device, dtype, head_dim, softcap)
    choices: list[list[Kernel]] = []
    if half and head_dim <= 256:
        name = "torch flash attention (CUDA)"
        flash = CudaKernel(name, torch_device, tile=_FLASH, square=_FLASH_CAUSAL, knows_groups=True)
        hopper = torch.cuda.get_device_capability(torch_device)[0] >= _HOPPER
        if hopper and head_dim <= 128:
            cudnn = CudaKernel(
                *("cuDNN attention", torch_device),
                tile=_CUDNN,
                square=_CUDNN_CAUSAL,
                small=_FLASH,  # cuDNN takes no single key
                least_pairs=_CUDNN_PAIRS,
            )
            choices.append([cudnn, flash])
        else:
            choices.append([flash])
    name = "memory-efficient attention (CUDA)"
    choices.append([CudaKernel(name, torch_device, tile=_EFFICIENT, square=_EFFICIENT_CAUSAL)])
    rest: list[Kernel] = [ReferenceKernel()]
    tables = [Kernels(kernels, rest) for kernels in choices]
    return [*_with_triton(torch_device, dtype, head_dim, choices, rest, None), *tables]


def _capped(
    torch_device: torch.device, dtype: torch.dtype, head_dim: int, softcap: float
) -> list[Kernels]:
    """Return tables of Triton programs alone: none of torch's operators bounds scores."""
    choices: list[list[Kernel]] = [[]]
    if dtype != torch.float32:
        with contextlib.suppress(Exception):  # which `_with_triton` tells of
            from headinfer.attend.fused_chunk import TritonChunks

            choices.insert(0, [TritonChunks.on(torch_device, head_dim, softcap)])
    rest: list[Kernel] = [ReferenceKernel(softcap)]
    return _with_triton(torch_device, dtype, head_dim, choices, rest, softcap)


def _with_triton(
    torch_device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    choices: list[list[Kernel]],
    rest: list[Kernel],
    softcap: float | None,
) -> list[Kernels]:
    """Return a table for each choice of kernels whose few rows Triton attends, if it can."""
    try:
        from headinfer.attend.fused_decode import TritonKernels, serves
    except Exception as error:  # it is not there, or is broken: torch's kernels serve
        _logger.info("no Triton: %s", error)
        return []
    if not serves(dtype, head_dim):
        return []
    properties = torch.cuda.get_device_properties(torch_device)
    shared_bytes = getattr(properties, "shared_memory_per_block_optin", 0)  # ROCm has none
    sizes = properties.multi_processor_count, shared_bytes
    return [TritonKernels(kernels, rest, *sizes, softcap) for kernels in choices]
