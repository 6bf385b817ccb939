"""What this machine can do, measured in a fresh process.

Rates are measured, not looked up. The best of several ways of doing the same is taken: a bound that
the measured code could beat would be none.
"""

import os
import platform
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import psutil
import torch

from headinfer.bench.bound import Rates
from headinfer.bench.build import torch_device
from headinfer.device.cuda import CudaDevice
from headinfer.device.identity import cpu_name, gpu_driver
from headinfer.plan.options import Options
from headinfer.probe import operations
from headinfer.probe.caches import beyond_caches
from headinfer.probe.timing import Operation, fastest

_BUFFER_BYTES = 256 * 2**20
"""Size of each buffer read, at least."""

_MATMUL_SIZES = (1024, 2048, 3072)
"""Between a small model's and a large one's."""

_SECONDS = 0.2
"""How long one operation is tried, where the least tries take less."""


def _best(operations: dict[str, Operation], synchronize: Callable[[], object]) -> tuple[float, str]:
    """Return the highest rate of any operation, per second, and which one reached it."""
    speed, name = fastest(operations, synchronize, seconds=_SECONDS)
    return speed.best_per_s, name


@torch.no_grad()
def measure(
    device: torch.device,
    dtype: torch.dtype,
    *,
    buffer_bytes: int = _BUFFER_BYTES,
    host_bytes: int | None = None,
    matmul_sizes: Sequence[int] = _MATMUL_SIZES,
    gpus: int = 1,
) -> tuple[Rates, dict[str, str]]:
    """Measure this machine; takes a few seconds.

    Args:
        device: where the model computes.
        dtype: of its weights.
        buffer_bytes: of each buffer read, at least.
        host_bytes: of those that the CPU reads; None for more than its caches hold.
        matmul_sizes: rows and columns of the matrices multiplied.
        gpus: whose links copy at once, the first ones; the other rates are the device's.

    Returns:
        The rates, and for each of them the operation that reached it.
    """
    on_device = device.type != "cpu"
    synchronize: Callable[[], object] = torch.cuda.synchronize if on_device else lambda: None
    elements = buffer_bytes // torch.float32.itemsize
    host_elements = (host_bytes or beyond_caches(buffer_bytes)) // torch.float32.itemsize
    host, host_by = _best(operations.readers(torch.device("cpu"), host_elements), lambda: None)
    matmul, matmul_by = _best(operations.matmuls(device, dtype, matmul_sizes), synchronize)
    best_by = {"host_bytes_per_s": host_by, "matmul_flops_per_s": matmul_by}
    if not on_device:
        return Rates(host_bytes_per_s=host, matmul_flops_per_s=matmul), best_by
    memory, memory_by = _best(operations.readers(device, elements), synchronize)
    cards = [CudaDevice(torch.device("cuda", number)) for number in range(gpus)]
    copy = operations.link(cards[:1], buffer_bytes, to_device=True)
    link, link_by = _best(copy, synchronize)
    links, links_by = None, ""
    if gpus > 1:
        synchronize = _synchronizing(gpus)
        copies = operations.link(cards, buffer_bytes, to_device=True)
        links, links_by = _best(copies, synchronize)
    shared, shared_by = _shared(cards, host_elements)
    best_by |= {"device_bytes_per_s": memory_by, "link_bytes_per_s": link_by}
    best_by |= {"links_bytes_per_s": links_by} if links_by else {}
    best_by["host_shared_bytes_per_s"] = shared_by
    rates = Rates(
        host_bytes_per_s=host,
        matmul_flops_per_s=matmul,
        device_bytes_per_s=memory,
        link_bytes_per_s=link,
        host_shared_bytes_per_s=shared,
        links_bytes_per_s=links,
    )
    return rates, best_by


def measure_shared(gpus: int) -> float:
    """Return the bytes a second of host memory that CPU and links read at once.

    Args:
        gpus: whose links copy, the first ones.
    """
    cards = [CudaDevice(torch.device("cuda", number)) for number in range(gpus)]
    rate, _ = _shared(cards, beyond_caches(_BUFFER_BYTES) // torch.float32.itemsize)
    return rate


def _shared(cards: Sequence[CudaDevice], elements: int) -> tuple[float, str]:
    return _best(operations.shared(cards, elements), _synchronizing(len(cards)))


def _synchronizing(gpus: int) -> Callable[[], object]:
    def synchronize() -> None:
        for number in range(gpus):
            torch.cuda.synchronize(number)

    return synchronize


def hardware(device: torch.device) -> dict[str, Any]:
    """Return the names and sizes of what is measured on."""
    on_device = device.type != "cpu"
    return {
        "cpu": cpu_name(),
        "cpu_cores": psutil.cpu_count(logical=False),
        "cpu_threads": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "host_memory_bytes": int(psutil.virtual_memory().total),
        "gpu": torch.cuda.get_device_name(device) if on_device else None,
        "gpu_memory_bytes": (
            torch.cuda.get_device_properties(device).total_memory if on_device else None
        ),
        "gpu_driver": gpu_driver() if on_device else None,
        "cuda": torch.version.cuda if on_device else None,
        "system": platform.platform(),
    }


def answer(values: dict[str, Any]) -> dict[str, Any]:
    """Return device, hardware and, where they are asked for, rates.

    Without the device asked for they are the host's. See `headinfer.bench.child`.
    """
    try:
        device = torch_device(Options.parse(device=values["device"]))
    except Exception:
        device = torch.device("cpu")
    found = {"device": device.type, "hardware": hardware(device)}
    if not values["rates"]:
        return found
    there = torch.cuda.device_count() if device.type == "cuda" else 1
    gpus = min(values["gpus"], there)
    rates, best_by = measure(device, getattr(torch, values["dtype"]), gpus=gpus)
    return found | {"rates": asdict(rates), "rates_by": best_by}
