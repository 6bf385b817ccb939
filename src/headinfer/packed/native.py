"""Packing and unpacking in the CPU's memory, by compiled kernels (`pages.c`)."""

import ctypes
import functools

import torch

from headinfer.native.build import compile_kernel
from headinfer.native.threads import take_torchs_threads
from headinfer.packed.layout import PageLayout, num_pages

_Strides = ctypes.c_int64 * 3


class _Pages(ctypes.Structure):
    """A `struct pages` of `pages.c`."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("values", "pages")),
        *((name, ctypes.c_int64) for name in ("batch", "heads", "tokens", "threads")),
        *((name, _Strides) for name in ("value_strides", "page_strides")),
    )


@functools.cache
def pages_library(dim: int) -> ctypes.CDLL | None:
    """Return the kernels compiled for a dim; None where they cannot be had."""
    definitions = PageLayout(dim).definitions
    library = compile_kernel(__package__, "pages.c", torch.bfloat16, **definitions)
    if library is not None:
        for function in (library.pack, library.unpack):
            function.argtypes = [ctypes.POINTER(_Pages)]
            function.restype = None
    return library


def pack_native(
    library: ctypes.CDLL, values: torch.Tensor, pages: torch.Tensor, threads: int | None = None
) -> None:
    """Pack `[batch, heads, tokens, dim]` into pages; both have a unit last stride.

    Args:
        library: compiled for the dim.
        values: read.
        pages: written.
        threads: that share the work; as many as torch is set to by default.
    """
    library.pack(ctypes.byref(_block(values, pages, threads)))


def unpack_native(
    library: ctypes.CDLL, pages: torch.Tensor, values: torch.Tensor, threads: int | None = None
) -> None:
    """Unpack pages into `[batch, heads, tokens, dim]`; see `pack_native`."""
    library.unpack(ctypes.byref(_block(values, pages, threads)))


def _block(values: torch.Tensor, pages: torch.Tensor, threads: int | None) -> _Pages:
    batch, heads, tokens, _ = values.shape
    assert values.stride(3) == pages.stride(3) == 1
    assert pages.shape[2] >= num_pages(tokens)
    return _Pages(
        *(values.data_ptr(), pages.data_ptr(), batch, heads, tokens),
        threads or take_torchs_threads(),
        *(_Strides(*values.stride()[:3]), _Strides(*pages.stride()[:3])),
    )
