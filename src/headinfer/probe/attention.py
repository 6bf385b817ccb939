"""Attention as the engine runs it, in the shape of one layer of Llama-3-8B, to be timed."""

import torch

from headinfer.attend.partial import Accumulator
from headinfer.attend.select import select_kernels
from headinfer.attend.work import Work, tile_in_hand
from headinfer.device.host_memory import available_host_bytes
from headinfer.errors import MemoryPlanError
from headinfer.kv.pair import KV
from headinfer.probe.timing import Operation
from headinfer.units import format_bytes

KV_HEADS = 8
GROUP = 4
HEAD_DIM = 128

_BLOCK_ELEMENTS = 2**20
_MOST_OF_FREE = 0.5
"""Share of free host memory: the system ends a process that takes it all, and we want a row
instead."""


def kv_bytes(dtype: torch.dtype, tokens: int) -> int:
    """Return the bytes of a context's keys and values."""
    return 2 * KV_HEADS * tokens * HEAD_DIM * dtype.itemsize


def decode(
    device: torch.device, dtype: torch.dtype, *, tokens: int, all_tokens: int, new_tokens: int = 1
) -> dict[str, Operation]:
    """Return a decode step's query against many contexts, one by one, under the kernel's name.

    The contexts lie side by side and are never the same twice in a row. So a short one is not read
    from the processor's caches.

    Args:
        device: where keys and values are.
        dtype: theirs.
        tokens: of one context.
        all_tokens: of all contexts together, in bytes several times the last-level cache.
        new_tokens: that attend at once: more than one where drafted tokens are verified.
    """
    kernels = select_kernels(device, dtype, HEAD_DIM, HEAD_DIM)
    query = _filled(device, dtype, 1, KV_HEADS, GROUP, new_tokens, HEAD_DIM)
    keys, values = (_filled(device, dtype, 1, KV_HEADS, all_tokens, HEAD_DIM) for _ in range(2))
    every = tile_in_hand(KV(keys, values))

    def run() -> None:
        for start in range(0, all_tokens, tokens):
            tile = every._replace(first=start, tokens=min(tokens, all_tokens - start))
            work = Work(query, [tile], HEAD_DIM**-0.5, Accumulator())
            kernels.pick(work).attend(work)

    return {kernels.name: (run, float(keys.nbytes + values.nbytes))}


def prefill(
    device: torch.device, dtype: torch.dtype, *, chunk_tokens: int, tile_tokens: int
) -> dict[str, Operation]:
    """Return a chunk's queries against a tile of past tokens, under the kernel's name.

    Args:
        device: where all of it is.
        dtype: of queries, keys and values.
        chunk_tokens: queries of each head.
        tile_tokens: keys of each head.
    """
    kernels = select_kernels(device, dtype, HEAD_DIM, HEAD_DIM)
    query = _filled(device, dtype, 1, KV_HEADS, GROUP, chunk_tokens, HEAD_DIM)
    keys, values = (_filled(device, dtype, 1, KV_HEADS, tile_tokens, HEAD_DIM) for _ in range(2))
    tile = tile_in_hand(KV(keys, values))
    flops = 2.0 * 2.0 * KV_HEADS * GROUP * chunk_tokens * tile_tokens * HEAD_DIM

    def run() -> None:
        work = Work(query, [tile], HEAD_DIM**-0.5, Accumulator())
        kernels.pick(work).attend(work)

    return {kernels.name: (run, flops)}


def _filled(device: torch.device, dtype: torch.dtype, *shape: int) -> torch.Tensor:
    """Return a tensor of normal numbers; a block of them is repeated, since drawing takes long.

    Raises:
        MemoryPlanError: it would take more of the host's free memory than is safe.
    """
    size_bytes = torch.Size(shape).numel() * dtype.itemsize
    if device.type == "cpu" and size_bytes > _MOST_OF_FREE * (free := available_host_bytes()):
        raise MemoryPlanError(
            f"{format_bytes(size_bytes)} of CPU memory are needed, {format_bytes(free)} are free"
        )
    tensor = torch.empty(shape, dtype=dtype, device=device)
    block = torch.randn(_BLOCK_ELEMENTS, device=device).to(dtype)
    for part in tensor.view(-1).split(_BLOCK_ELEMENTS):
        part.copy_(block[: part.numel()])
    return tensor
