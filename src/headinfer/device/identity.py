"""Names of the processors here: what tells a measurement of this machine from another's."""

import os
import platform
import sys
from contextlib import suppress
from pathlib import Path

from headinfer.plan.measurement import NO_GPU, Identity


def identity(device: str = "auto") -> Identity:
    """Return what this machine is, without importing torch.

    Args:
        device: "cpu" where the CPU is the device whatever GPUs there are; all else stands for the
            current GPU. Its name is known once torch is imported, and asking initialises CUDA.
    """
    return Identity(
        cpu=cpu_name(), cpu_threads=os.cpu_count() or 1, gpu=NO_GPU if device == "cpu" else _gpu()
    )


def cpu_name() -> str:
    """Return the processor's name, or at least its architecture."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def gpu_driver() -> str | None:
    """Return the version of NVIDIA's kernel driver; None without one."""
    with suppress(OSError):
        return Path("/sys/module/nvidia/version").read_text().strip()
    return None


def _gpu() -> str | None:
    torch = sys.modules.get("torch")
    if torch is None:
        return None
    return str(torch.cuda.get_device_name()) if torch.cuda.is_available() else NO_GPU
