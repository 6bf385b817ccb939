"""`--hardware`: a machine by name, or the one that was measured."""

from dataclasses import replace
from typing import Annotated

import typer

from headinfer.device.identity import identity
from headinfer.errors import OptionError
from headinfer.estimate.machines import HARDWARE, preset_hardware
from headinfer.plan.hardware import THIS, Hardware
from headinfer.units import counted

HardwareName = Annotated[
    str,
    typer.Option(
        "--hardware",
        metavar="NAME",
        help=f"{', '.join(HARDWARE)}, or {THIS}: as measured by `headinfer probe`.",
    ),
]


def hardware_of(name: str) -> Hardware:
    """Return a machine known by name, or for "this" the measured one.

    Raises:
        OptionError: there is none of that name, or this machine was not measured yet.
    """
    if name != THIS:
        return preset_hardware(name)
    measured, reason = measured_hardware()
    if measured is None:
        raise OptionError(
            f"hardware {THIS!r} is {reason}; run `headinfer probe` first, or name one of "
            f"{', '.join(HARDWARE)}"
        )
    return measured


def measured_hardware() -> tuple[Hardware | None, str]:
    """Return this machine as `headinfer probe` measured it, if it did; and what to say of that.

    A GPU is taken for the one that was measured: asking for its name would import torch.
    """
    from headinfer.plan.measured import read_measurement

    measurement = read_measurement()
    if measurement is None:
        return None, "not measured yet"
    measured_on = measurement.identity
    if not replace(identity("cpu"), gpu=None).matches(measured_on):
        return None, (
            f"not measured yet: the last measurement is of another machine, with "
            f"{measured_on.cpu} and {counted(measured_on.cpu_threads, 'thread')}"
        )
    return measurement.hardware, "as `headinfer probe` measured it"
