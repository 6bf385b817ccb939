"""The choice of a table: the best whose results on small inputs agree with the reference."""

import functools
import logging

import torch

from headinfer.attend.band import find_band
from headinfer.attend.check import TOLERANCE
from headinfer.attend.cpu import CpuKernel
from headinfer.attend.native.kernel import NativeKernel, decode_library
from headinfer.attend.reference import ReferenceKernel
from headinfer.attend.table import Kernels
from headinfer.attend.verdict import agrees_here

_logger = logging.getLogger(__name__)


@functools.cache
def select_kernels(
    torch_device: torch.device,
    dtype: torch.dtype,
    key_dim: int,
    value_dim: int,
    softcap: float | None = None,
) -> Kernels:
    """Return the table for one kind of layer.

    Args:
        torch_device: where the tensors live.
        dtype: of queries, keys and values.
        key_dim: elements of one key.
        value_dim: elements of one value.
        softcap: bound of the scores, or None.
    """
    reference, tables = ReferenceKernel(softcap), []
    if key_dim == value_dim and dtype in TOLERANCE:
        if torch_device.type == "cuda":
            from headinfer.attend import cuda  # which importing the package without a GPU spares

            tables = cuda.candidates(torch_device, dtype, key_dim, softcap)
        elif torch_device.type == "cpu" and softcap is None:
            tables = [Kernels([CpuKernel()], [reference])]
            if decode_library(dtype, key_dim, 1) is not None:
                tables.insert(0, Kernels([NativeKernel()], tables[0].kernels))
    for kernels in tables:
        if agrees_here(kernels, torch_device, dtype, key_dim, softcap):
            kernels.find_band = functools.partial(find_band, torch_device, dtype, key_dim, softcap)
            return kernels
        _logger.warning("%s fails its check here; another kernel is used", kernels.name)
    return Kernels([reference])
