"""Checks of a GPU's kernels that passed, kept so that later processes need not make them.

Measured beside an H100: the checks of Triton's and torch's kernels took 0.3 s of a process's first
prompt, and those of cuDNN's 1.9 s.
"""

import functools
import hashlib
import importlib.metadata
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch

from headinfer.attend.check import agrees
from headinfer.attend.table import Kernels
from headinfer.device.identity import gpu_driver
from headinfer.folders import private_folder

_FOLDER = "kernels"
_CODE = "attend", "eight_bits", "native", "packed"
"""Folders of this package that kernels are made of."""


def agrees_here(
    kernels: Kernels,
    torch_device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    softcap: float | None = None,
) -> bool:
    """Return what `agrees` does; on CUDA it runs only where it never agreed before.

    What it depends on is this package's code, the versions below it, the driver and the GPU.
    """
    check = functools.partial(agrees, kernels, torch_device, dtype, head_dim, softcap)
    if torch_device.type != "cuda":
        return check()
    about = kernels.name, str(dtype), head_dim, softcap, *_machine(torch_device), *_software()
    return kept(about, check)


def kept(about: tuple[object, ...], check: Callable[[], bool]) -> bool:
    """Return whether a check passes, which it need not do again once it did.

    A failure is not kept: it may have been for lack of memory, or another process's doing. Where
    no folder can be written, the check is made in each process.

    Args:
        about: all that the outcome depends on.
        check: makes it.
    """
    name = hashlib.sha256(repr(about).encode()).hexdigest()[:32]
    with suppress(OSError):
        if (private_folder(_FOLDER) / name).exists():
            return True
    passed = check()
    if passed:
        with suppress(OSError):
            (private_folder(_FOLDER) / name).touch()
    return passed


def _machine(torch_device: torch.device) -> tuple[object, ...]:
    properties = torch.cuda.get_device_properties(torch_device)
    return properties.name, properties.major, properties.minor, gpu_driver()


@functools.cache
def _software() -> tuple[object, ...]:
    """Return what tells the code of kernels: this package's, and versions."""
    triton = None
    with suppress(importlib.metadata.PackageNotFoundError):
        triton = importlib.metadata.version("triton")
    digest = hashlib.sha256()
    package = Path(__file__).parents[1]
    for folder in _CODE:
        for path in sorted((package / folder).glob("*.py")):
            digest.update(path.read_bytes())
    cuda, cudnn = torch.version.cuda or torch.version.hip, torch.backends.cudnn.version()
    return torch.__version__, triton, cuda, cudnn, digest.hexdigest()
