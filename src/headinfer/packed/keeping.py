"""Keeping pages as they are on CUDA, in one launch for each form, by Triton's program."""

import torch

from headinfer.native.triton_launch import Program
from headinfer.packed.layout import PAGE_TOKENS, RawFlag, num_pages
from headinfer.packed.triton_raw import keep_raw_pages

_AT_ONCE = 2048
"""Values that are copied at a time."""

_KEEP_RAW = Program(keep_raw_pages, num_warps=4)


def keep_raw(
    values: torch.Tensor,
    pages: torch.Tensor,
    raw: torch.Tensor,
    taken: torch.Tensor,
    flag: RawFlag,
) -> None:
    """Copy the values of flagged pages, and write into these where the copies are.

    Args:
        values: as they were packed.
        pages: as they were packed.
        raw: `[slots, slot_bytes]` of uint8 in memory of the CPU, as the device addresses it.
        taken: `[1]` of int64 on the device: slots that are taken; counted up.
        flag: of the form.
    """
    batch, heads, tokens, dim = values.shape
    whole = PAGE_TOKENS * dim
    _KEEP_RAW.launch(
        (num_pages(tokens), batch * heads, 1),
        (values, pages, raw, taken),
        (tokens, heads, raw.stride(0)),
        (*values.stride()[:3], *pages.stride()[:3]),
        (dim, min(whole & -whole, _AT_ONCE), *flag),
    )
