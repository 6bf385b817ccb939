"""Products of few rows with weights in 16 bits, by the compiled kernel.

It reads weights where the model has them, so that nothing is kept of them and a change in place is
seen. torch's own product of one row reads them at a third to half of the speed of memory.
"""

import ctypes
import functools

import torch

from headinfer.device.host_calls import NativeFunction
from headinfer.native.build import compile_kernel

MAX_ROWS = 8
"""Rows up to which reading weights takes longer than computing."""

DTYPES = frozenset({torch.bfloat16, torch.float16})
"""Dtypes of weights that are served. In float32 torch's own product is as fast as memory."""

_OWN_TYPES = frozenset({torch.Tensor, torch.nn.Parameter})
_POINTER = ctypes.c_void_p


class _Block(ctypes.Structure):
    """A `struct product` of `few_rows.c`."""

    _fields_ = (
        *((name, _POINTER) for name in ("x", "weights", "bias", "y")),
        *((name, ctypes.c_int64) for name in ("size", "out")),
    )


class Product(NativeFunction):
    """A product in memory, to be computed by a call, and again for other contents of `x`.

    It keeps its tensors, and uses as many threads as torch is set to.

    Args:
        library: `few_rows_library`.
        x: `[..., in]`, without gaps.
        weight: `[out, in]`, without gaps.
        bias: `[out]`, or None.

    Attributes:
        output: `[..., out]`, where the result goes.
    """

    __slots__ = ("_block", "_kept", "output")

    def __init__(
        self,
        library: ctypes.CDLL,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
    ) -> None:
        out, size = weight.shape
        output = self.output = torch.empty((*x.shape[:-1], out), dtype=x.dtype, device=x.device)
        self._kept = x, weight, bias
        self._block = _Block(
            *(x.data_ptr(), weight.data_ptr(), None if bias is None else bias.data_ptr()),
            *(output.data_ptr(), size, out),
        )
        super().__init__(library.multiply, ctypes.addressof(self._block), library.multiply_in)


@functools.cache
def few_rows_library(dtype: torch.dtype, rows: int) -> ctypes.CDLL | None:
    """Return the kernel compiled for a dtype and a number of rows; None where it cannot be had."""
    if dtype not in DTYPES or not 0 < rows <= MAX_ROWS:
        return None
    library = compile_kernel(__package__, "few_rows.c", dtype, ROWS=rows)
    if library is not None:
        library.multiply.argtypes = [_POINTER]
        library.multiply.restype = None
    return library


def product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> Product | None:
    """Return what computes `torch.nn.functional.linear` in float32, rounded once.

    Derivatives are not for it.

    Args:
        x: `[..., in]`.
        weight: `[out, in]`.
        bias: `[out]`, or None.

    Returns:
        None for more rows than `MAX_ROWS`, or for tensors of subclasses. None for weights that are
        not in 16 bits on the CPU without gaps.
    """
    dtype, shape = weight.dtype, x.shape
    if type(weight) not in _OWN_TYPES or type(x) is not torch.Tensor or weight.ndim != 2:
        return None
    _, size = weight.shape
    rows = x.numel() // size if size else 0
    if (
        dtype not in DTYPES
        or x.dtype is not dtype
        or shape[-1:] != (size,)
        or not 0 < rows <= MAX_ROWS
    ):
        return None
    if not (weight.is_cpu and x.is_cpu and weight.is_contiguous()):
        return None
    if bias is not None and (bias.dtype is not dtype or not bias.is_contiguous()):
        return None
    library = few_rows_library(dtype, rows)
    return None if library is None else Product(library, x.contiguous(), weight, bias)


def multiply(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor | None:
    """Return a product, computed; None where there is none of `product`."""
    work = product(x, weight, bias)
    if work is None:
        return None
    work()
    return work.output
