"""`headinfer probe`: measure this machine once, for the planner."""

import enum
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn
from rich.table import Table

from headinfer.cli import options as opt
from headinfer.cli.console import EXIT_UNEXPECTED, reporting_errors, stderr_console
from headinfer.cli.load import share_cores
from headinfer.cli.output import STDOUT, JsonPath, check_writable, write_json
from headinfer.cli.text import wrapping_console
from headinfer.disk.folder import check_folder
from headinfer.plan.hardware import DiskRate
from headinfer.plan.measured import read_measurement
from headinfer.plan.measurement import Measurement, Quantity, Rate
from headinfer.probe import keep
from headinfer.probe.caches import beyond_caches
from headinfer.schedule.route import MAX_ASKED_TOKENS
from headinfer.units import counted, format_bytes, format_tokens

if TYPE_CHECKING:
    from headinfer.device.base import Device

_NOTHING = "-"

_BUSY = 0.3
"""Medians so far below the best tell more of what else ran than of the machine."""

_LABELS = {
    Quantity.MATMUL: "matrix products",
    Quantity.DEVICE_COPY: "GPU memory, copy",
    Quantity.DEVICE_READ: "GPU memory, read",
    Quantity.PREFILL_ATTENTION: "attention, prefill",
    Quantity.DECODE_ATTENTION: "attention, decode",
    Quantity.TO_DEVICE: "link, to GPU",
    Quantity.TO_HOST: "link, to CPU",
    Quantity.BOTH_WAYS: "link, both at once",
    Quantity.HOST_READ: "CPU memory, read",
    Quantity.HOST_SHARED: "CPU memory, with link",
    Quantity.HOST_ATTENTION: "attention, on CPU",
    Quantity.HOST_VERIFY: f"{MAX_ASKED_TOKENS} tokens, on CPU",
}
_CPU_LABELS = {
    Quantity.DEVICE_COPY: "memory, copy",
    Quantity.HOST_READ: "memory, read",
    Quantity.HOST_ATTENTION: "attention, decode",
    Quantity.HOST_VERIFY: f"{MAX_ASKED_TOKENS} new tokens",
}
"""Where the CPU is the device."""

_IN_FLOPS = (Quantity.MATMUL, Quantity.PREFILL_ATTENTION)
_BY_TOKENS = (
    Quantity.PREFILL_ATTENTION,
    Quantity.DECODE_ATTENTION,
    Quantity.HOST_ATTENTION,
    Quantity.HOST_VERIFY,
)


class ProbeDevice(str, enum.Enum):
    """What to measure as the device."""

    AUTO = "auto"
    CPU = "cpu"
    CUDA = "cuda"


class ProbeDtype(str, enum.Enum):
    """Number type of what is multiplied and attended."""

    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"
    FLOAT32 = "float32"


def probe(
    device: Annotated[
        ProbeDevice,
        typer.Option("--device", metavar="NAME", help="cpu, cuda or auto: CUDA if there is one."),
    ] = ProbeDevice.AUTO,
    dtype: Annotated[
        ProbeDtype, typer.Option("--dtype", metavar="TYPE", help="bfloat16, float16 or float32.")
    ] = ProbeDtype.BFLOAT16,
    quick: Annotated[
        bool,
        typer.Option("--quick", metavar=opt.NO_VALUE, help="A rough measurement in a few seconds."),
    ] = False,
    disk: Annotated[
        str | None,
        typer.Option(
            "--disk",
            metavar="FOLDER",
            help="Also measure the disk that a folder is on, for `--disk-cache`. Up to 2 GiB are "
            "written to a file without a name there.",
        ),
    ] = None,
    json_path: JsonPath = None,
) -> None:
    """Measure this machine once, so that plans count with its own rates.

    Takes about half a minute; let nothing else keep the machine busy.
    The result replaces the last one in your cache folder. Exit code 1
    if plans cannot use it; it is not kept then.
    """
    with reporting_errors():
        check_writable("--json", json_path)
        keep.check_writable()
        rate = None if disk is None else _measure_disk(disk, quick=quick)
        measurement = _measure(device.value, dtype.value, quick=quick)
        measurement = replace(measurement, disks=(rate,) if rate else ())
        # Kept and written first, in case stdout takes nothing.
        before = read_measurement()
        whole = measurement.keeping_disks(before)
        kept = None if measurement.missing else keep.save_measurement(whole)
        if json_path is not None:
            write_json(json_path, keep.to_json(measurement))
        console = wrapping_console(stderr=json_path == STDOUT)
        _print(console, measurement, disk)
        _tell_kept(console, measurement, kept)
        if json_path not in (None, STDOUT):
            console.print(f"written to {json_path}", markup=False, soft_wrap=True)
        if measurement.missing:
            raise typer.Exit(EXIT_UNEXPECTED)


def _measure_disk(folder: str, *, quick: bool) -> DiskRate:
    """Measure a disk first: nothing else is to use it, and a folder may be wrong."""
    check_folder(folder, "--disk")
    with stderr_console().status("measuring the disk"):
        from headinfer.probe.disk import measure_disk

        return measure_disk(folder, quick=quick)


def _measure(device_name: str, dtype_name: str, *, quick: bool) -> Measurement:
    share_cores()  # as where the rates will be put to use
    console = stderr_console()
    with console.status("starting"):
        import torch

        from headinfer.probe import run

        device = _device(device_name)
    columns = (
        SpinnerColumn(),
        BarColumn(28),
        MofNCompleteColumn(),
        TextColumn("{task.description}"),
    )
    shown = console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=not shown) as progress:
        task = progress.add_task("", total=None)

        def show(quantity: Quantity, size: int | None, done: int, total: int) -> None:
            on_cpu = device.tiles_are_views
            text = f"{_label(quantity, on_cpu)} {_size(quantity, size)}"
            progress.update(task, description=text, completed=done, total=total)

        effort = run.QUICK if quick else run.FULL
        effort = replace(effort, host_bytes=beyond_caches(effort.buffer_bytes))
        return run.run_probe(device, getattr(torch, dtype_name), effort, show)


def _device(name: str) -> "Device":
    import torch

    from headinfer.probe.run import make_device

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return make_device(name)


def _tell_kept(console: Console, measurement: Measurement, kept: Path | None) -> None:
    """Tell where the measurement is kept, or why it is of no use to plans."""
    if kept is None:
        on_cpu = not measurement.has_device
        names = ", ".join(_label(quantity, on_cpu) for quantity in measurement.missing)
        console.print(f"[bold]not kept:[/] plans need what could not be measured ({names})")
    else:
        place = escape(str(kept))
        console.print(f"kept in {place} for [bold]--hardware this[/]", soft_wrap=True)


def _print(console: Console, measurement: Measurement, disk: str | None) -> None:
    """Print the conditions, the table, and below it what could not be measured."""
    for line in _conditions(measurement):
        console.print(line, markup=False)
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 2, 0, 0), pad_edge=False)
    table.add_column("measured", no_wrap=True)
    for heading in ("size", "rate", "share"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("reached by")
    for measured in measurement.rates:
        table.add_row(*_cells(measurement, measured))
    if disk is not None:
        for rate in measurement.disks:
            for row in _disk_rows(rate, disk):
                table.add_row(*row)
    console.print(table)
    console.print("attention, copies, disk: medians; others: the best; share: of what bounds it")
    if measurement.slowdown > _BUSY:
        console.print(
            f"[bold]this machine was busy:[/] medians up to {measurement.slowdown:.0%} below the "
            "best; probe again when it is idle"
        )


def _conditions(measurement: Measurement) -> Iterator[str]:
    identity = measurement.identity
    host = f"{identity.cpu}, {counted(measurement.torch_threads, 'thread')}"
    memory = f"{format_bytes(measurement.host_memory_bytes)} of memory"
    yield f"{host}, {memory}, {format_bytes(measurement.host_free_bytes)} free"
    if measurement.has_device:
        memory = f"{format_bytes(measurement.device_memory_bytes)} of memory"
        free = format_bytes(measurement.device_free_bytes)
        yield f"{identity.gpu}, {memory}, {free} free"
    versions = ", ".join(f"{name} {version}" for name, version in measurement.versions.items())
    quick = ", a quick measurement" if measurement.quick else ""
    yield f"{measurement.dtype}{quick}; {versions}"


def _cells(measurement: Measurement, rate: Rate) -> Iterator[str]:
    yield _label(rate.quantity, not measurement.has_device)
    yield _size(rate.quantity, rate.size)
    if rate.counted_per_s is None:
        yield from ("failed", _NOTHING, rate.failure or "")
        return
    yield _per_second(rate.counted_per_s, "FLOP/s" if rate.quantity in _IN_FLOPS else "B/s")
    share = measurement.share_of_ceiling(rate)
    yield _NOTHING if share is None else f"{share:.0%}"
    yield rate.reached_by


def _disk_rows(rate: DiskRate, folder: str) -> Iterator[tuple[str, ...]]:
    """Yield a row for writing and one for reading."""
    from headinfer.probe.disk import how

    ways = {"write": rate.write_bytes_per_s, "read": rate.read_bytes_per_s}
    for way, per_s in ways.items():
        yield f"disk, {way}", "", _per_second(per_s, "B/s"), _NOTHING, how(rate, folder)


def _label(quantity: Quantity, on_cpu: bool) -> str:
    return (_CPU_LABELS if on_cpu else {}).get(quantity, _LABELS[quantity])


def _size(quantity: Quantity, size: int | None) -> str:
    if size is None:
        return ""
    if quantity in _BY_TOKENS:
        return format_tokens(size)
    return format_bytes(size).replace(".00", "")


def _per_second(rate: float, unit: str) -> str:
    """Return a rate with a decimal prefix, as data sheets have it, and three digits."""
    prefix, factor = next(
        ((prefix, factor) for prefix, factor in (("T", 1e12), ("G", 1e9)) if rate >= factor),
        ("M", 1e6),
    )
    value = rate / factor
    decimals = 2 if value < 10 else 1 if value < 100 else 0
    return f"{value:.{decimals}f} {prefix}{unit}"
