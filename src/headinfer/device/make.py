"""The device that an attachment's options ask for, and what is known of it."""

import logging
from typing import TYPE_CHECKING

import torch

from headinfer.device.base import Device
from headinfer.device.identity import identity
from headinfer.errors import OptionError
from headinfer.plan.hardware import Hardware
from headinfer.plan.measured import load_measured
from headinfer.plan.options import Options

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


def measured_hardware(device: Device, sharing: int = 1) -> Hardware | None:
    """Return what `headinfer probe` measured of a machine; a simulated device has no rates.

    Args:
        device: where attention is computed.
        sharing: processes of one model that share the CPU and its memory.
    """
    if device.name == "simulated":
        return None
    measured = load_measured(identity(device.name))
    return measured if measured is None or sharing == 1 else measured.shared_by(sharing)


def make_device(
    name: str, model_device: torch.device, simulated_device: "SimulatedDevice | None"
) -> Device:
    """Return the device a model on `model_device` is served on.

    Args:
        name: the `device` of `attach`.
        model_device: where the model's weights are.
        simulated_device: the instance to use where a simulated one is asked for, if any.

    Raises:
        OptionError: there is no such device, or the model is elsewhere.
    """
    if name == "auto":
        name = model_device.type
    kind = "cuda" if name == "cuda" else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise OptionError("device 'cuda' was asked for, but CUDA is not available; use 'cpu'")
    if model_device.type != kind:
        raise OptionError(f"device is {name!r}, but the model is on {model_device}; move it first")
    # Each is imported where it is used: an attachment has one of them.
    if name == "cuda":
        from headinfer.device.cuda import CudaDevice

        return CudaDevice(model_device)
    if name == "simulated":
        from headinfer.device.simulated import SimulatedDevice

        return simulated_device or SimulatedDevice()
    from headinfer.device.cpu import CpuDevice

    return CpuDevice()
