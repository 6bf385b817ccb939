"""Kernels as tests call them: one tile in hand, whose partial is returned."""

import functools

import torch

from headinfer.attend.cpu import CpuKernel
from headinfer.attend.masks import band_works
from headinfer.attend.native.kernel import NativeKernel
from headinfer.attend.partial import Accumulator, Partial
from headinfer.attend.reference import ReferenceKernel
from headinfer.attend.table import Kernels
from headinfer.attend.work import Kernel, Work, tile_in_hand
from headinfer.kv.pair import KV


@functools.cache
def only(kernel: Kernel) -> Kernels:
    """Return the table of one kernel that serves all, always the same."""
    return Kernels([kernel])


def reference() -> Kernels:
    """Return the table that all others are compared with."""
    return Kernels([ReferenceKernel()])


def native() -> Kernels:
    """Return the table of the compiled kernels, as it is chosen, without the reference."""
    return Kernels([NativeKernel()], [CpuKernel()])


def attended(
    kernels: Kernels,
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    *,
    scale: float,
    causal: bool = False,
    mask: torch.Tensor | None = None,
) -> Partial:
    """Return the partial of some queries over all given keys that are visible."""
    total = Accumulator()
    tile = tile_in_hand(KV(keys, values))
    work = Work(query, [tile], scale, total, causal=causal, mask=mask)
    kernels.pick(work).attend(work)
    return total.result()


def exact_band(
    query: torch.Tensor, kv: KV, scale: float, window_tokens: int, softcap: float | None
) -> Partial:
    """Attend within a window by its definition, with masks, in float64."""
    total = Accumulator()
    for work in band_works(
        query.double(),
        tile_in_hand(KV(*(part.double() for part in kv))),
        scale=scale,
        into=total,
        window_tokens=window_tokens,
        padding=None,
    ):
        ReferenceKernel(softcap).attend(work)
    return total.result()
