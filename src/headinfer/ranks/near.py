"""The socket that a rank's GPU hangs on: the cores and the memory near to it."""

import os
from contextlib import suppress
from pathlib import Path
from typing import Any

_SYSTEM = Path("/sys")


def cores_near(address: str, system: Path = _SYSTEM) -> frozenset[int]:
    """Return the cores of the NUMA node that a PCI device hangs on.

    Args:
        address: as "0000:65:00.0".
        system: where the kernel tells of devices.

    Returns:
        No cores where the system has one node, or does not tell.
    """
    nodes = list((system / "devices/system/node").glob("node[0-9]*"))
    if len(nodes) < 2:
        return frozenset()
    with suppress(OSError, ValueError):
        node = int((system / "bus/pci/devices" / address.lower() / "numa_node").read_text())
        if node >= 0:
            listed = (system / f"devices/system/node/node{node}/cpulist").read_text()
            return _parse(listed)
    return frozenset()


def _parse(listed: str) -> frozenset[int]:
    """Return the numbers of a list such as "0-3,8"."""
    cores: set[int] = set()
    for part in listed.strip().split(","):
        first, _dash, last = part.partition("-")
        cores.update(range(int(first), int(last or first) + 1))
    return frozenset(cores)


def stay_near(local_rank: int, on_host: int) -> int:
    """Keep this process on the cores near its GPU; return how many threads it should have.

    To be called before threads are begun, which inherit it. Memory that they touch first is of the
    same node. Ranks whose GPUs hang on one node share its cores.

    Args:
        local_rank: also the number of the GPU.
        on_host: ranks on this host.
    """
    if not hasattr(os, "sched_setaffinity"):
        return max((os.cpu_count() or 1) // on_host, 1)
    allowed = os.sched_getaffinity(0)
    near = [cores_near(address) for address in _gpu_addresses(on_host)]
    mine = near[local_rank] & allowed if local_rank < len(near) else frozenset[int]()
    if not mine:
        return max(len(allowed) // on_host, 1)
    os.sched_setaffinity(0, mine)
    return max(len(mine) // near.count(near[local_rank]), 1)


def _gpu_addresses(count: int) -> list[str]:
    """Return the PCI addresses of the first GPUs, as far as torch knows them; none without CUDA."""
    import torch

    if not torch.cuda.is_available():
        return []
    addresses = []
    for index in range(min(count, torch.cuda.device_count())):
        gpu: Any = torch.cuda.get_device_properties(index)
        if not hasattr(gpu, "pci_bus_id"):
            return []
        addresses.append(f"{gpu.pci_domain_id:04x}:{gpu.pci_bus_id:02x}:{gpu.pci_device_id:02x}.0")
    return addresses
