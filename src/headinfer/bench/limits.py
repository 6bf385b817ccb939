"""Holding a trial to `--device-memory`, whatever its method."""

import resource
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from headinfer.bench.catalogue import CATALOGUE
from headinfer.errors import MemoryPlanError
from headinfer.plan.memory import CUDA_OUTSIDE_BYTES
from headinfer.plan.options import Options
from headinfer.units import format_bytes


def limit_device(settings: Options, devices: Sequence[torch.device]) -> None:
    """Let torch allocate no more on each GPU, from now on, than on a card of the budget's size.

    What CUDA takes outside of torch's allocator is of the budget too, whatever the method.
    """
    budget = settings.device_memory_bytes
    for device in devices:
        if device.type == "cuda" and budget is not None:
            total = torch.cuda.get_device_properties(device).total_memory
            for_torch = max(budget - CUDA_OUTSIDE_BYTES, 0)
            torch.cuda.set_per_process_memory_fraction(min(for_torch / total, 1.0), device)


@contextmanager
def limit_host(
    method: str, settings: Options, device: torch.device, weights_bytes: int
) -> Iterator[None]:
    """Where the CPU is the device, let memory grow by what the budget leaves beside the weights.

    KV and activations count from here on, as the system counts private writable memory. Memory that
    is mapped counts as used, so this is at least as strict as resident memory. On other systems
    than Linux nothing is limited. Our methods keep to a simulated device's budget by themselves.
    Stock's know no such device, so all of their memory counts as its.

    Args:
        method: name in `headinfer.bench.catalogue.CATALOGUE`.
        settings: of the run.
        device: that the model computes on.
        weights_bytes: of the model.

    Raises:
        MemoryPlanError: the budget does not hold the weights.
    """
    simulated = settings.device == "simulated" and not CATALOGUE[method].is_stock
    if device.type != "cpu" or settings.device == "cuda" or simulated:
        yield
        return
    budget = settings.device_memory_bytes
    if budget is None:
        yield
        return
    if budget <= weights_bytes:
        raise MemoryPlanError(
            f"--device-memory of {format_bytes(budget)} is below the weights, "
            f"{format_bytes(weights_bytes)}"
        )
    in_use = _data_bytes()
    if in_use is None:
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (in_use + budget - weights_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def _data_bytes() -> int | None:
    """Return the private writable memory of this process; None where the system does not say."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmData:")), None)
