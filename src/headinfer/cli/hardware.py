"""`--hardware`: a machine by name, or the one that was measured."""

from typing import Annotated

import typer

from headinfer.errors import OptionError
from headinfer.plan.hardware import HARDWARE, THIS, Hardware, preset_hardware

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
    from headinfer.plan.measured import load_measured

    measured = load_measured()
    if measured is None:
        raise OptionError(
            f"hardware {THIS!r} has not been measured; run `headinfer probe` first, or name one of "
            f"{', '.join(HARDWARE)}"
        )
    return measured
