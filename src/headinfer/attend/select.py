"""The choice of a kernel: the best whose results on a small input agree with the reference."""

import functools
import logging

import torch

from headinfer.attend import cuda
from headinfer.attend.check import TOLERANCE, agrees
from headinfer.attend.cpu import CpuKernel
from headinfer.attend.native.kernel import NativeKernel, decode_library
from headinfer.attend.partial import Kernel
from headinfer.attend.reference import ReferenceKernel

_logger = logging.getLogger(__name__)


@functools.cache
def select_kernel(
    torch_device: torch.device,
    dtype: torch.dtype,
    key_dim: int,
    value_dim: int,
    softcap: float | None = None,
) -> Kernel:
    """Return the kernel for one kind of layer.

    Args:
        torch_device: where the tensors live.
        dtype: of queries, keys and values.
        key_dim: elements of one key.
        value_dim: elements of one value.
        softcap: bound of the scores, or None.
    """
    reference = ReferenceKernel(softcap)
    if softcap is not None or key_dim != value_dim or dtype not in TOLERANCE:
        return reference
    if torch_device.type == "cuda":
        fused = cuda.candidates(torch_device, dtype, key_dim)
    elif torch_device.type == "cpu":
        fused = [CpuKernel()]
        if decode_library(dtype, key_dim, 1) is not None:
            fused.insert(0, NativeKernel())
    else:
        fused = []
    for kernel in fused:
        if agrees(kernel, torch_device, dtype, key_dim):
            return kernel
        _logger.warning("%s fails its check here; another kernel is used", kernel.name)
    return reference
