"""Compiling what decode steps attend with on the CPU, while a prompt is read."""

import functools
import logging
import threading

import torch

from headinfer.attend.native.job import job_library
from headinfer.attend.native.kernel import decode_library
from headinfer.attend.native.server import server_library
from headinfer.plan.format import Format

_logger = logging.getLogger(__name__)


@functools.cache
def begin_compiling(dtype: torch.dtype, head_dim: int, rows: int, form: Format) -> threading.Thread:
    """Begin to compile, on a thread of its own, what is not kept yet; only the first call does.

    Whoever needs one of these kernels meanwhile waits for it. Decode steps behind the first prompt
    on a machine found none of them.

    Measured beside an H200, Llama-3-8B with 400K packed tokens: that first step took 2.1 s, and
    0.4 s with dense tokens, whose kernels were there.

    Args:
        dtype: of keys and values.
        head_dim: elements of one key, and of one value.
        rows: query rows of one KV head in a decode step.
        form: in which tokens lie in host memory.

    Returns:
        The thread. A process that ends waits for it, some seconds at most.
    """
    thread = threading.Thread(
        target=_compile, args=(dtype, head_dim, rows, form), name="headinfer-compiler"
    )
    thread.start()
    return thread


def _compile(dtype: torch.dtype, head_dim: int, rows: int, form: Format) -> None:
    try:
        for each in dict.fromkeys((form, Format.DENSE)):  # the newest tokens are dense
            decode_library(dtype, head_dim, rows, each)
        job_library(dtype)
        server_library()
    except Exception as error:  # who needs one will be told
        _logger.info("no kernel of the CPU's was compiled ahead: %s", error)
