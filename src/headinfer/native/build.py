"""Compiles kernels in C on first use and keeps them in the user's cache folder.

Each is compiled for one shape and for the processor at hand, in half a second. What is kept is
loaded only if this user or root wrote it and it is whole. What cannot be kept is compiled by each
process. What cannot be had, without a compiler or without GCC's OpenMP, is None, and torch's
kernels serve.
"""

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import threading
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import torch

from headinfer.checked_files import DamagedError, check_sealed, write_sealed
from headinfer.folders import describe, private_folder, temporary_folder
from headinfer.scratch import scratch_folder

_logger = logging.getLogger(__name__)

ELEMENTS = {
    torch.float32: "ELEMENT_IS_FLOAT32",
    torch.bfloat16: "ELEMENT_IS_BFLOAT16",
    torch.float16: "ELEMENT_IS_FLOAT16",
}
"""Dtypes that kernels are compiled for."""

_FLAGS: tuple[str, ...] = (
    "-O3",
    "-march=native",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fopenmp",
    "-fPIC",
)
_COMPILE_TIMEOUT_S = 60
_FORMAT = "sealed"
"""Part of a kept kernel's name: what is written otherwise has another."""

_TORCH_LIBRARY = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"


class _CompileError(Exception):
    """A compiler does not compile a kernel."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Recipe:
    """A recipe by which one kernel is compiled.

    Attributes:
        compiler: the command, with its arguments.
        flags: for the compiler proper.
        openmp: library to link with.
        source: name of the file to compile.
        files: it and the headers, by name.
    """

    compiler: str
    flags: tuple[str, ...]
    openmp: str
    source: str
    files: dict[str, bytes]

    @property
    def library(self) -> str:
        """The name under which the kernel is kept, other for all it depends on."""
        digest = hashlib.sha256(b"".join(self.files.values()))
        parts = (self.compiler, self.flags, self.openmp, _processor(), platform.libc_ver(), _FORMAT)
        digest.update(repr(parts).encode())
        return f"{digest.hexdigest()[:24]}.so"

    def compile(self, folder: Path) -> bytes:
        """Compile in a folder and return the library.

        Raises:
            OSError: the folder cannot be written to.
            _CompileError: says why the compiler failed.
        """
        for file, content in self.files.items():
            (folder / file).write_bytes(content)
        compiler = self.compiler.split()
        _run([*compiler, *self.flags, "-c", "-o", "kernel.o", self.source], folder)
        _run([*compiler, "-shared", "-o", "kernel.so", "kernel.o", self.openmp, "-lm"], folder)
        return (folder / "kernel.so").read_bytes()


def compile_kernel(
    package: str, source: str, dtype: torch.dtype, **definitions: int
) -> ctypes.CDLL | None:
    """Return a kernel compiled with some definitions; None where it cannot be had.

    Args:
        package: the name of the package that the file is in. Headers come from there and from here.
        source: the file's name.
        dtype: of the elements it reads; one of `ELEMENTS`.
        definitions: names and values for the preprocessor.
    """
    compiler = os.environ.get("CC", "").strip() or shutil.which("cc") or shutil.which("gcc")
    openmp = _openmp_library()
    if openmp is None:
        _say_missing("torch does not run on GCC's OpenMP here")
        return None
    if compiler is None:
        _say_missing("there is no C compiler: install gcc, or name one in CC")
        return None
    flags = (*_FLAGS, f"-D{ELEMENTS[dtype]}")
    flags += tuple(f"-D{name}={value}" for name, value in definitions.items())
    files = _headers() | _headers(package) | {source: _read(package, source)}
    recipe = _Recipe(compiler=compiler, flags=flags, openmp=openmp, source=source, files=files)
    try:
        return _kept_library(recipe)
    except OSError as error:
        _say_missing(describe(error))
    except _CompileError as error:
        _say_missing(f"{compiler} cannot compile it: {error}")
    return None


def _kept_library(recipe: _Recipe) -> ctypes.CDLL:
    """Return a kernel from the cache folder, or where that cannot be used, from a temporary one."""
    try:
        return _library_in(private_folder("native"), recipe)
    except OSError as error:
        _say_not_kept(describe(error))
    return _library_in(temporary_folder(), recipe)


_taking: dict[Path, threading.Lock] = {}
"""Locks, one for each kernel's file. The thread that looks for a file, or compiles it, holds it."""


def _library_in(folder: Path, recipe: _Recipe) -> ctypes.CDLL:
    """Load a kernel from a folder in which nobody else can put one; compile it if need be."""
    path = folder / recipe.library
    with _taking.setdefault(path, threading.Lock()):
        try:
            check_sealed(path)
        except FileNotFoundError:
            _compile(recipe, path)
        except (OSError, DamagedError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            _logger.warning("%s cannot be used (%s): it is compiled anew", path, reason)
            _compile(recipe, path)
    return ctypes.CDLL(str(path))


def _compile(recipe: _Recipe, path: Path) -> None:
    """Compile into a file of its own, then rename, so that processes may race."""
    with scratch_folder(path.parent) as folder:
        content = recipe.compile(folder)
        write_sealed(folder / path.name, content)
        (folder / path.name).replace(path)


def _run(command: list[str], folder: Path) -> None:
    try:
        done = subprocess.run(
            command,
            cwd=folder,
            capture_output=True,
            timeout=_COMPILE_TIMEOUT_S,
            start_new_session=True,  # a terminal's Ctrl-C is for us; a compiler would end half-way
        )
    except subprocess.TimeoutExpired as error:
        raise _CompileError(f"it takes more than {_COMPILE_TIMEOUT_S} s") from error
    except OSError as error:
        raise _CompileError(describe(error)) from error
    if done.returncode:
        lines = done.stderr.decode(errors="replace").splitlines()
        errors = [line for line in lines if "error" in line] or lines
        raise _CompileError(errors[0].strip() if errors else f"exit status {done.returncode}")


_missing: list[str] = []
"""Why kernels could not be had in this process."""


def _say_missing(reason: str) -> None:
    """Say why a kernel cannot be had, and what that costs; once in a process to all users."""
    _logger.log(
        logging.INFO if _missing else logging.WARNING,
        "compiled kernels for the CPU cannot be had (%s): torch's serve, decoding at about half "
        "the speed",
        reason,
    )
    _missing.append(reason)


@functools.cache
def _say_not_kept(reason: str) -> None:
    """Say so once in a process."""
    _logger.warning(
        "compiled kernels for the CPU cannot be kept (%s): each process compiles its own; set "
        "XDG_CACHE_HOME to a folder that only you can write to",
        reason,
    )


@functools.cache
def _headers(package: str = __package__) -> dict[str, bytes]:
    names = sorted(file.name for file in resources.files(package).iterdir())
    return {name: _read(package, name) for name in names if name.endswith(".h")}


def _read(package: str, name: str) -> bytes:
    return resources.files(package).joinpath(name).read_bytes()


@functools.cache
def _processor() -> str:
    """Return what the compiler's `-march=native` depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() + platform.machine()
    return "".join(line for line in lines if line.startswith(("model name", "flags", "Features")))


class _SymbolInfo(ctypes.Structure):
    """A record by `dladdr` of an address: the file it was loaded from, and the nearest symbol."""

    _fields_ = (
        ("file", ctypes.c_char_p),
        ("base", ctypes.c_void_p),
        ("symbol", ctypes.c_char_p),
        ("address", ctypes.c_void_p),
    )


def _openmp_library() -> str | None:
    """Return the OpenMP library torch runs on; None where that is not GCC's.

    The kernels must share torch's threads: idle threads of a second library would keep the cores
    busy waiting. Such threads made decoding in bfloat16 up to twice as slow. Other packages, such
    as scikit-learn, load one of their own, so the linker is asked which one serves torch.
    """
    info = _SymbolInfo()
    try:
        function = ctypes.CDLL(str(_TORCH_LIBRARY)).GOMP_parallel
        found = ctypes.CDLL(None).dladdr(function, ctypes.byref(info))
    except (OSError, AttributeError):  # no such library, or no such function
        return None
    path = os.fsdecode(info.file) if found and info.file else ""
    return path if "libgomp" in Path(path).name else None
