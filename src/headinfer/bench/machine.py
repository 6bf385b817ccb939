"""What this machine can do: `python -m headinfer.bench.machine`, JSON on stdin and on stdout.

Rates are measured, not looked up, and the best of several ways of doing the same is taken: a bound
that the measured code could beat would be none.
"""

import os
import platform
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil
import torch

from headinfer.bench import child
from headinfer.bench.bound import Rates
from headinfer.bench.spec import Settings
from headinfer.bench.trial import torch_device

_BUFFER_ELEMENTS = 64 * 2**20
"""float32: 256 MiB, several times the last-level cache."""

_MATMUL_SIZES = (1024, 2048, 3072)
_LEAST_TRIES = 2
_SECONDS = 0.2
"""How long one operation is tried, where the least tries take less."""


Operation = tuple[Callable[[], object], float]
"""Something to run, and the bytes or operations it takes."""


def _best(operations: dict[str, Operation], synchronize: Callable[[], object]) -> tuple[float, str]:
    """Return the highest rate of any operation, per second, and which one reached it."""
    rates = {}
    for name, (run, amount) in operations.items():
        run()
        synchronize()
        seconds: list[float] = []
        while len(seconds) < _LEAST_TRIES or sum(seconds) < _SECONDS:
            start_s = time.perf_counter()
            run()
            synchronize()
            seconds.append(time.perf_counter() - start_s)
        rates[name] = amount / min(seconds)
    best = max(rates, key=lambda name: rates[name])
    return rates[best], best


def _readers(device: torch.device, elements: int) -> dict[str, Operation]:
    """Return operations bound by the memory of a device.

    Each of them is slow on some machine: a plain `torch.sum` reaches a third of the memory's rate.
    """
    one, other = (torch.ones(elements, device=device) for _ in range(2))
    width = min(4096, elements)
    matrix = one[: elements // width * width].view(-1, width)
    vector = torch.ones(matrix.shape[0], device=device)
    size = float(one.nbytes)
    return {
        "torch.dot": (lambda: torch.dot(one, other), 2 * size),
        "torch.mv": (lambda: torch.mv(matrix.T, vector), float(matrix.nbytes)),
        "torch.amax": (lambda: torch.amax(one), size),
        "torch.linalg.vector_norm": (lambda: torch.linalg.vector_norm(one), size),
        "copy, both directions counted": (lambda: other.copy_(one), 2 * size),
    }


def _link(device: torch.device, elements: int) -> dict[str, Operation]:
    """Return a copy of pinned host memory to the device."""
    host = torch.ones(elements, pin_memory=True)
    target = torch.empty(elements, device=device)
    return {"pinned copy": (lambda: target.copy_(host, non_blocking=True), float(host.nbytes))}


def _matmuls(
    device: torch.device, dtype: torch.dtype, sizes: Sequence[int]
) -> dict[str, Operation]:
    """Return square matrix products, of sizes between a small model's and a large one's."""
    operations: dict[str, Operation] = {}
    for size in sizes:
        # Drawn at random: some processors are faster on constants.
        left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        out = torch.empty(size, size, device=device, dtype=dtype)
        run = _product(left, right, out)
        operations[f"{size} x {size}"] = (run, 2.0 * size**3)
    return operations


def _product(
    left: torch.Tensor, right: torch.Tensor, out: torch.Tensor
) -> Callable[[], torch.Tensor]:
    return lambda: torch.matmul(left, right.T, out=out)


@torch.no_grad()
def measure(
    device: torch.device,
    dtype: torch.dtype,
    *,
    elements: int = _BUFFER_ELEMENTS,
    matmul_sizes: Sequence[int] = _MATMUL_SIZES,
) -> tuple[Rates, dict[str, str]]:
    """Measure this machine; takes a few seconds.

    Args:
        device: where the model computes.
        dtype: of its weights.
        elements: float32 elements of the buffers read.
        matmul_sizes: rows and columns of the matrices multiplied.

    Returns:
        The rates, and for each of them the operation that reached it.
    """
    on_device = device.type != "cpu"
    synchronize: Callable[[], object] = torch.cuda.synchronize if on_device else lambda: None
    host, host_by = _best(_readers(torch.device("cpu"), elements), lambda: None)
    matmul, matmul_by = _best(_matmuls(device, dtype, matmul_sizes), synchronize)
    best_by = {"host_bytes_per_s": host_by, "matmul_flops_per_s": matmul_by}
    if not on_device:
        return Rates(host_bytes_per_s=host, matmul_flops_per_s=matmul), best_by
    memory, memory_by = _best(_readers(device, elements), synchronize)
    link, link_by = _best(_link(device, elements), synchronize)
    best_by |= {"device_bytes_per_s": memory_by, "link_bytes_per_s": link_by}
    rates = Rates(
        host_bytes_per_s=host,
        matmul_flops_per_s=matmul,
        device_bytes_per_s=memory,
        link_bytes_per_s=link,
    )
    return rates, best_by


def hardware(device: torch.device) -> dict[str, Any]:
    """Return the names and sizes of what is measured on."""
    on_device = device.type != "cpu"
    return {
        "cpu": _cpu_model(),
        "cpu_cores": psutil.cpu_count(logical=False),
        "cpu_threads": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "host_memory_bytes": int(psutil.virtual_memory().total),
        "gpu": torch.cuda.get_device_name(device) if on_device else None,
        "gpu_memory_bytes": (
            torch.cuda.get_device_properties(device).total_memory if on_device else None
        ),
        "gpu_driver": _gpu_driver() if on_device else None,
        "cuda": torch.version.cuda if on_device else None,
        "system": platform.platform(),
    }


def _cpu_model() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _gpu_driver() -> str | None:
    with suppress(OSError):
        return Path("/sys/module/nvidia/version").read_text().strip()
    return None


def _serve(values: dict[str, Any]) -> dict[str, Any]:
    """Answer with device, hardware and rates; without the device asked for, with the host's."""
    try:
        device = torch_device(Settings(device=values["device"]))
    except Exception:
        device = torch.device("cpu")
    rates, best_by = measure(device, getattr(torch, values["dtype"]))
    return {
        "device": device.type,
        "hardware": hardware(device),
        "rates": asdict(rates),
        "rates_by": best_by,
    }


if __name__ == "__main__":
    child.serve(_serve)
