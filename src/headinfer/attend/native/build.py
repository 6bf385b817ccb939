"""Compiles the C kernels of this package on first use and keeps them in the user's cache folder.

Each is compiled for one shape and for the processor at hand, in half a second. What cannot be had,
without a compiler or without GCC's OpenMP, is None, and torch's kernels serve.
"""

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from importlib import resources
from pathlib import Path

import torch

from headinfer.folders import cache_folder

_logger = logging.getLogger(__name__)

ELEMENTS = {
    torch.float32: "ELEMENT_IS_FLOAT32",
    torch.bfloat16: "ELEMENT_IS_BFLOAT16",
    torch.float16: "ELEMENT_IS_FLOAT16",
}
"""Dtypes of keys and values that the kernels are compiled for."""

_FLAGS: tuple[str, ...] = (
    "-O3",
    "-march=native",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fopenmp",
    "-fPIC",
)
_HEADERS = ("elements.h", "heads.h", "merge.h", "panels.h", "tiles.h", "workers.h")
_COMPILE_TIMEOUT_S = 60
_TORCH_LIBRARY = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"


def compile_kernel(source: str, dtype: torch.dtype, **definitions: int) -> ctypes.CDLL | None:
    """Return a kernel compiled with some definitions; None where it cannot be had.

    Args:
        source: the file's name, in this package.
        dtype: of keys and values; one of `ELEMENTS`.
        definitions: names and values for the preprocessor.
    """
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc")
    openmp = _openmp_library()
    if compiler is None or openmp is None:
        _logger.info("no C compiler or no OpenMP: torch's kernels serve on the CPU")
        return None
    flags = (*_FLAGS, f"-D{ELEMENTS[dtype]}")
    flags += tuple(f"-D{name}={value}" for name, value in definitions.items())
    files = {name: _read(name) for name in (source, *_HEADERS)}
    digest = hashlib.sha256(b"".join(files.values()))
    digest.update(repr((compiler, flags, openmp, _processor(), platform.libc_ver())).encode())
    library = cache_folder() / "native" / f"{digest.hexdigest()[:24]}.so"
    try:
        if not library.exists():
            _compile(compiler.split(), flags, openmp, source, files, library)
        return ctypes.CDLL(str(library))
    except (OSError, subprocess.SubprocessError) as error:
        _logger.info("%s cannot be had: %s", source, error)
        return None


def _read(name: str) -> bytes:
    return resources.files(__package__).joinpath(name).read_bytes()


@functools.cache
def _processor() -> str:
    """Return what the compiler's `-march=native` depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() + platform.machine()
    return "".join(line for line in lines if line.startswith(("model name", "flags", "Features")))


class _SymbolInfo(ctypes.Structure):
    """What `dladdr` tells of an address: the file it was loaded from, and the nearest symbol."""

    _fields_ = (
        ("file", ctypes.c_char_p),
        ("base", ctypes.c_void_p),
        ("symbol", ctypes.c_char_p),
        ("address", ctypes.c_void_p),
    )


def _openmp_library() -> str | None:
    """Return the OpenMP library torch runs on; None where that is not GCC's.

    The kernels must share torch's threads: idle threads of a second library would keep the cores
    busy waiting, which made decoding in bfloat16 up to twice as slow. Other packages, such as
    scikit-learn, load one of their own, so the linker is asked which one serves torch.
    """
    info = _SymbolInfo()
    try:
        function = ctypes.CDLL(str(_TORCH_LIBRARY)).GOMP_parallel
        found = ctypes.CDLL(None).dladdr(function, ctypes.byref(info))
    except (OSError, AttributeError):  # no such library, or no such function
        return None
    path = os.fsdecode(info.file) if found and info.file else ""
    return path if "libgomp" in Path(path).name else None


def _compile(
    compiler: list[str],
    flags: tuple[str, ...],
    openmp: str,
    source: str,
    files: dict[str, bytes],
    library: Path,
) -> None:
    """Compile into a file of its own, then rename, so that processes may race."""
    library.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=library.parent) as name:
        folder = Path(name)
        for file, content in files.items():
            (folder / file).write_bytes(content)
        for command in (
            [*compiler, *flags, "-c", "-o", "kernel.o", source],
            [*compiler, "-shared", "-o", "kernel.so", "kernel.o", openmp, "-lm"],
        ):
            subprocess.run(
                command, cwd=folder, check=True, capture_output=True, timeout=_COMPILE_TIMEOUT_S
            )
        (folder / "kernel.so").replace(library)
