"""Partial attention of a decode step on the CPU by a kernel of our own, compiled where it runs.

`native.c` is compiled by the system's C compiler when it is first needed, for one head_dim, number
of query rows and element type, and kept in the user's cache folder. Without a compiler, or where
the compiled kernel fails its check, torch's fused kernel serves instead.

Measured on two cores with AVX-512 that read memory at 35 GB/s, 4 KV heads x 4 queries x 32K tokens:
26 GB/s in float32, 25 in bfloat16 and in float16, against 14, 10 and 3 for torch's fused kernel.
"""

import ctypes
import functools
import hashlib
import logging
import math
import os
import platform
import shutil
import subprocess
import tempfile
from importlib import resources
from pathlib import Path

import torch

from headinfer.attend.cpu import CpuKernel
from headinfer.attend.partial import Partial, stack_rows
from headinfer.attend.split import merge_splits
from headinfer.folders import cache_folder

_logger = logging.getLogger(__name__)

ELEMENTS = {
    torch.float32: "ELEMENT_IS_FLOAT32",
    torch.bfloat16: "ELEMENT_IS_BFLOAT16",
    torch.float16: "ELEMENT_IS_FLOAT16",
}
_FLAGS = (
    "-O3",
    "-march=native",
    "-ffast-math",  # reassociates sums, and vectorises exp
    "-fno-finite-math-only",  # but infinities are used
    "-fopenmp",
    "-fPIC",
)
_MAX_ROWS = 8
"""Query rows that fit the registers of any processor; more are worth a matrix product."""

DIM_MULTIPLE = 16
"""The head_dim must be one of; the lanes of the widest vectors."""

_COMPILE_TIMEOUT_S = 60
_MIN_SPLIT_TOKENS = 512


def _processor() -> str:
    """Return what the compiler's `-march=native` depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() + platform.machine()
    return "".join(line for line in lines if line.startswith(("model name", "flags", "Features")))


def _openmp_library() -> str | None:
    """Return the OpenMP library torch runs on; None where that is not GCC's.

    The kernel must share torch's threads: idle threads of a second library would keep the cores
    busy waiting, which made decoding in bfloat16 up to twice as slow.
    """
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return None
    paths = {line.split()[-1] for line in lines if "libgomp" in line}
    return min(paths) if len(paths) == 1 else None


@functools.cache
def compiled(dtype: torch.dtype, head_dim: int, rows: int) -> "ctypes._NamedFuncPointer | None":
    """Return `attend_heads` of `native.c` for one shape; None where it cannot be had.

    Compiles it the first time, which takes a fifth of a second.

    Args:
        dtype: of keys and values.
        head_dim: elements of one key, and of one value.
        rows: query rows of one KV head.
    """
    if dtype not in ELEMENTS or head_dim % DIM_MULTIPLE or not 0 < rows <= _MAX_ROWS:
        return None
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc")
    openmp = _openmp_library()
    if compiler is None or openmp is None:
        _logger.info("no C compiler or no OpenMP: torch's fused kernel serves decode steps")
        return None
    source = resources.files("headinfer.attend").joinpath("native.c").read_bytes()
    flags = (*_FLAGS, f"-DHEAD_DIM={head_dim}", f"-DROWS={rows}", f"-D{ELEMENTS[dtype]}")
    digest = hashlib.sha256(source)
    digest.update(repr((compiler, flags, openmp, _processor(), platform.libc_ver())).encode())
    library = cache_folder() / "native" / f"{digest.hexdigest()[:24]}.so"
    try:
        if not library.exists():
            _compile(compiler.split(), flags, openmp, source, library)
        function = ctypes.CDLL(str(library)).attend_heads
    except (OSError, AttributeError, subprocess.SubprocessError) as error:
        _logger.info("the native kernel cannot be had: %s", error)
        return None
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    function.argtypes = [
        *(pointer, pointer, pointer),  # query, keys, values
        *(number, number, number, number, number),  # strides, count, heads, splits
        *(ctypes.c_float, pointer, pointer, ctypes.c_int),  # scale, out, lse, threads
    ]
    function.restype = None
    return function


def _compile(
    compiler: list[str], flags: tuple[str, ...], openmp: str, source: bytes, library: Path
) -> None:
    """Compile into a file of its own, then rename, so that processes may race."""
    library.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=library.parent) as name:
        folder = Path(name)
        (folder / "native.c").write_bytes(source)
        for command in (
            [*compiler, *flags, "-c", "-o", "native.o", "native.c"],
            [*compiler, "-shared", "-o", "native.so", "native.o", openmp, "-lm"],
        ):
            subprocess.run(
                command, cwd=folder, check=True, capture_output=True, timeout=_COMPILE_TIMEOUT_S
            )
        (folder / "native.so").replace(library)


class NativeKernel:
    """Decode tiles by the compiled kernel; all else by torch's fused one.

    Results are float32 whatever the input, so that merging rounds once. Uses as many threads as
    torch is set to.
    """

    name = "native attention (CPU)"

    def __init__(self) -> None:
        self._other = CpuKernel()

    def attend(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        *,
        scale: float,
        causal: bool = False,
        mask: torch.Tensor | None = None,
    ) -> Partial:
        """Attend; see `Kernel.attend`."""
        _, _, group, q_len, head_dim = query.shape
        rows = group * q_len
        square = causal and q_len > 1
        function = None
        if not square and mask is None and keys.shape[2] > 0:
            function = compiled(query.dtype, head_dim, rows)
        # The kernel reads tokens that follow each other without a gap.
        if (
            function is None
            or keys.stride()[2:] != (head_dim, 1)
            or values.stride()[2:] != (head_dim, 1)
        ):
            return self._other.attend(query, keys, values, scale=scale, causal=causal, mask=mask)
        return stack_rows(
            [
                _attend_row(function, query[row], keys[row], values[row], scale)
                for row in range(query.shape[0])
            ]
        )


def _attend_row(
    function: "ctypes._NamedFuncPointer",
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    scale: float,
) -> Partial:
    """Attend one row of the batch: `[kv_heads, group, q_len, dim]` to `[kv_heads, kv_len, dim]`."""
    kv_heads, group, q_len, head_dim = query.shape
    kv_len = keys.shape[1]
    threads = torch.get_num_threads()
    # As few splits as give every thread the same number of parts.
    splits = min(threads // math.gcd(threads, kv_heads), max(kv_len // _MIN_SPLIT_TOKENS, 1))
    rows = query.float().contiguous()
    out = torch.empty(kv_heads, splits, group, q_len, head_dim)
    lse = torch.empty(kv_heads, splits, group, q_len)
    function(
        rows.data_ptr(),
        keys.data_ptr(),
        values.data_ptr(),
        keys.stride(0),
        values.stride(0),
        kv_len,
        kv_heads,
        splits,
        scale,
        out.data_ptr(),
        lse.data_ptr(),
        threads,
    )
    if splits == 1:
        return Partial(out[:, 0], lse[:, 0])
    return Partial(*merge_splits(out, lse))
