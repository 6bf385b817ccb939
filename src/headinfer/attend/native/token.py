"""A decode step's attention of one layer, to be captured: no Python runs in it (`token.h`)."""

import ctypes
from typing import Any

import torch

from headinfer.attend.native.kernel import NativeKernel, decode_library
from headinfer.attend.native.splits import stealable_splits
from headinfer.attend.table import Kernels
from headinfer.attend.work import TokenWork, Work
from headinfer.device.host_calls import NativeFunction
from headinfer.kv.pair import KV

_POINTER, _NUMBER = ctypes.c_void_p, ctypes.c_int64
_UNLIMITED = 2**31


class _Block(ctypes.Structure):
    """A `struct token` of `token.h`."""

    _fields_ = (
        *((name, _POINTER) for name in ("query", "new_keys", "new_values")),
        *((name, _POINTER) for name in ("keys", "values", "result", "place")),
        *((name, _POINTER) for name in ("rows", "out", "lse", "parts")),
        *((name, _NUMBER) for name in ("new_key_stride", "new_value_stride")),
        *((name, _NUMBER) for name in ("key_stride", "value_stride")),
        *((name, _NUMBER) for name in ("heads", "group", "most_splits")),
        ("scale", ctypes.c_float),
    )


class TokenFunction(NativeFunction):
    """A function that does for a token what `Kernels.decode` does, to the last bit.

    It keeps all it uses, and may be called again when the token's place is another.

    Args:
        library: `decode_library` of the shape.
        work: whose place is in memory.
    """

    __slots__ = ("_block", "_kept")

    def __init__(self, library: Any, work: TokenWork) -> None:
        query, new, whole, place = work.query, work.new, work.tile.whole, work.place
        assert place is not None
        batch, kv_heads, group, _, dim = query.shape
        heads = batch * kv_heads
        most_splits = stealable_splits(torch.get_num_threads(), heads, _UNLIMITED)
        rows = torch.empty(heads, group, dim, device="cpu")
        out, lse = torch.empty_like(rows), torch.empty(heads, group, device="cpu")
        parts = torch.empty(most_splits * heads * group * (dim + 1), device="cpu")
        self._kept = query, new, whole, work.out, place, rows, out, lse, parts
        self._block = _Block(
            *(query.data_ptr(), new.keys.data_ptr(), new.values.data_ptr()),
            *(whole.keys.data_ptr(), whole.values.data_ptr(), work.out.data_ptr()),
            *(place.data_ptr(), rows.data_ptr(), out.data_ptr(), lse.data_ptr()),
            *(parts.data_ptr(), new.keys.stride(1), new.values.stride(1)),
            *(whole.keys.stride(1), whole.values.stride(1)),
            *(heads, group, most_splits, work.scale),
        )
        block = ctypes.addressof(self._block)
        super().__init__(library.attend_token, block, library.attend_token_in)


def token_function(kernels: Kernels, work: TokenWork) -> TokenFunction | None:
    """Return what does `kernels.decode(work)` without Python; None where only that serves."""
    query, tile = work.query, work.tile
    if not query.is_cpu or work.sinks is not None or work.sink_tokens:
        return None
    if not isinstance(kernels.pick(Work(query, (tile,), work.scale)), NativeKernel):
        return None
    library = decode_library(query.dtype, query.shape[4], query.shape[2])
    if library is None or not (query.is_contiguous() and work.out.is_contiguous()):
        return None
    heads_alike = all(map(_has_heads_alike, (work.new, tile.whole)))
    return TokenFunction(library, work) if heads_alike else None


def _has_heads_alike(kv: KV) -> bool:
    """Whether rows of the batch are as many heads more, and each token is without gaps."""
    return all(
        part.stride(3) == 1 and (len(part) == 1 or part.stride(0) == part.shape[1] * part.stride(1))
        for part in kv
    )
