"""The device that an attachment's options ask for, and what is known of it."""

import contextlib
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from headinfer.device.base import Device
from headinfer.device.identity import identity
from headinfer.disk.mount import mount_of
from headinfer.errors import OptionError
from headinfer.plan.hardware import Hardware
from headinfer.plan.measured import load_measured
from headinfer.plan.options import Options
from headinfer.units import counted

if TYPE_CHECKING:
    from headinfer.device.simulated import SimulatedDevice

_logger = logging.getLogger(__name__)


def warn_of_options_for_a_device(options: Options) -> None:
    """Say which options do nothing where the CPU attends all of the cache where it lies."""
    for name in ("resident_tokens", "host_attention"):
        value = getattr(options, name)
        if value not in ("auto", 0):
            _logger.warning(
                "%s=%s has no effect on the CPU, which attends all of the KV cache where it lies",
                name,
                value,
            )


def measured_hardware(
    device: Device, sharing: int = 1, disk_cache: str | None = None
) -> Hardware | None:
    """Return what `headinfer probe` measured of a machine; a simulated device has no rates.

    Args:
        device: where attention is computed.
        sharing: processes of one model that share the CPU and its memory.
        disk_cache: a folder on the disk below host memory; None for no disk. Nothing is known of
            one that is not there.
    """
    if device.name == "simulated":
        return None
    disk = None
    if disk_cache is not None:
        with contextlib.suppress(OSError, ValueError):  # it is refused where its file is made
            disk = mount_of(disk_cache).disk
    measured = load_measured(identity(device.name), disk)
    return measured if measured is None or sharing == 1 else measured.shared_by(sharing)


def make_devices(
    name: str,
    layers: Sequence[torch.device],
    simulated: "SimulatedDevice | Sequence[SimulatedDevice] | None",
) -> list[Device]:
    """Return the device that each layer of a model is served on.

    Args:
        name: the `device` of `attach`.
        layers: where each layer that attends computes.
        simulated: the instance to use where a simulated one is asked for, or one for each layer.

    Raises:
        OptionError: there is no such device, the model is elsewhere, or there are not as many
            simulated devices as layers.
    """
    first = layers[0]
    if name == "auto":
        name = first.type
    kind = "cuda" if name == "cuda" else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise OptionError("device 'cuda' was asked for, but CUDA is not available; use 'cpu'")
    if first.type != kind:
        raise OptionError(f"device is {name!r}, but the model is on {first}; move it first")
    # Each is imported where it is used: an attachment has one kind of them.
    if name == "simulated":
        from headinfer.device.simulated import SimulatedDevice

        given = simulated or SimulatedDevice()
        each_given = given if isinstance(given, Sequence) else [given]
        if not all(isinstance(each, SimulatedDevice) for each in each_given):
            raise OptionError(
                f"simulated_device must be a SimulatedDevice, or a list of them, not {given!r}"
            )
        devices = [given] * len(layers) if isinstance(given, SimulatedDevice) else list(each_given)
        if len(devices) != len(layers):
            raise OptionError(
                f"device has {counted(len(devices), 'simulated device')}, but the model has "
                f"{counted(len(layers), 'attention layer')}; give one device, or one for each layer"
            )
        return list[Device](devices)
    if name == "cuda":
        from headinfer.device.cuda import CudaDevice

        gpus: dict[torch.device, Device] = {
            each: CudaDevice(each) for each in dict.fromkeys(layers)
        }
        return [gpus[each] for each in layers]
    from headinfer.device.cpu import CpuDevice

    return [CpuDevice()] * len(layers)
