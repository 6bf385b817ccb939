"""`headinfer plan`: whether it fits, how long it takes and what to set, without weights or GPU."""

from typing import Annotated, Any

import typer

from headinfer.cli.console import reporting_errors, stderr_console
from headinfer.cli.form_options import PlannedLoadIn
from headinfer.cli.hardware import hardware_of, measured_hardware
from headinfer.cli.options import (
    MEMORY_PANEL,
    MODEL_PANEL,
    NO_VALUE,
    RESEARCH_PANEL,
    Dtype,
    DtypeChoice,
    parse_flags,
    was_given,
    with_flags,
)
from headinfer.cli.output import STDOUT, JsonPath, check_writable, write_json
from headinfer.disk.mount import free_bytes, mount_of
from headinfer.errors import OptionError
from headinfer.estimate.accounting import AccountingKind
from headinfer.estimate.below import Disk
from headinfer.estimate.machines import preset_hardware
from headinfer.estimate.methods import method_plans
from headinfer.estimate.situation import Situation
from headinfer.plan.format import Format
from headinfer.plan.hardware import THIS, Hardware
from headinfer.plan.host_room import HostRoom
from headinfer.plan.measured import read_measurement
from headinfer.plan.options import Options
from headinfer.plan.shape import ModelShape
from headinfer.plan.streaming import PAPERS_SPARSITY
from headinfer.units import parse_tokens

_DEFAULT_HARDWARE = "rtx-4090"
_EXIT_NOTHING_FITS = 1
_MOST_ROWS = 2**16
_MOST_GPUS = 1024


@with_flags(
    "device_memory",
    "host_memory",
    "disk_cache",
    "chunk_tokens",
    "kv_cache",
    "sparsity",
    "sink_tokens",
    "recent_tokens",
    device_memory="The most to use on the device, such as 24GiB; auto: all the hardware has.",
    host_memory="All of the host's memory, such as 1TiB; auto: what the hardware has. KV gets what "
    "the process, page tables and a reserve leave of it.",
    disk_cache="A folder on a fast disk, for the oldest tokens that CPU memory has no room for. "
    "Its free space counts, and its rate as `headinfer probe --disk` measured it.",
    chunk_tokens="Tokens of a prefill chunk, such as 4K, or auto.",
    kv_cache="How the KV cache lies in CPU memory, in our methods: dense, packed or auto (dense). "
    "int8 and fp8 are a method more, which is approximate.",
    sparsity="Share of KV heads that stream in the row head-wise-sparse; 0 is 0.5, the paper's.",
)
def plan(
    *,
    invocation: typer.Context,
    model: Annotated[
        str,
        typer.Option(
            "--model",
            "-m",
            metavar="NAME",
            help="A preset such as llama-3-8b, a hub id, a folder, a config.json, a GGUF file, "
            "demo, smollm2 or gemma3-270m.",
            rich_help_panel=MODEL_PANEL,
        ),
    ] = "llama-3-8b",
    context: Annotated[
        str,
        typer.Option(
            "--context",
            metavar="COUNT",
            help="Tokens of prompt and answer together, such as 128K or 1M.",
            rich_help_panel=MODEL_PANEL,
        ),
    ] = "128K",
    batch: Annotated[
        int,
        typer.Option(
            "--batch",
            min=1,
            metavar="COUNT",
            help="Rows at once.",
            rich_help_panel=MODEL_PANEL,
        ),
    ] = 1,
    gpus: Annotated[
        int | None,
        typer.Option(
            "--gpus",
            min=1,
            max=_MOST_GPUS,
            metavar="COUNT",
            help="Plan for so many GPUs: what fits, which split is faster, beside one. Weights "
            "that the GPUs do not hold stay in CPU memory.",
            rich_help_panel=MODEL_PANEL,
        ),
    ] = None,
    dtype: Dtype = DtypeChoice.AUTO,
    load_in: PlannedLoadIn = None,
    hardware: Annotated[
        str | None,
        typer.Option(
            "--hardware",
            metavar="NAME",
            help=f"A machine by name, or {THIS}: as measured by `headinfer probe`, which is the "
            f"default where it was; otherwise {_DEFAULT_HARDWARE}.",
            rich_help_panel=MEMORY_PANEL,
        ),
    ] = None,
    flags: dict[str, Any],
    accounting: Annotated[
        AccountingKind,
        typer.Option(
            "--accounting",
            metavar="NAME",
            help="ours: what runs of ours peak at; paper: the formulas of its Table 10.",
            rich_help_panel=RESEARCH_PANEL,
        ),
    ] = AccountingKind.OURS,
    json_path: JsonPath = None,
    steps: Annotated[
        bool,
        typer.Option(
            "--steps",
            metavar=NO_VALUE,
            help="Also print what the chosen method does in a decode step and in the last chunk.",
        ),
    ] = False,
    paper: Annotated[
        bool,
        typer.Option(
            "--paper",
            metavar=NO_VALUE,
            help="Print the paper's tables 3 to 8, 10, 11 and 14 beside ours, and nothing else.",
        ),
    ] = False,
) -> None:
    """Tell whether a context fits, how long it takes and what to set, for every method.

    Needs no GPU and no weights. Exit code 1 when no exact method fits.
    """
    with reporting_errors():
        check_writable("--json", json_path)
        if paper:
            _check_alone(invocation)
            from headinfer.cli.plan_paper import print_paper

            print_paper()
            return
        if batch > _MOST_ROWS:
            raise OptionError(f"--batch must be at most {_MOST_ROWS:,}, not {batch}")
        options = parse_flags(flags)
        here, which, note = _hardware(hardware)
        disk = None
        if options.disk_cache is not None:
            here, disk = _above_disk(here, options, accounting)
        if gpus is not None:
            from headinfer.cli.plan_gpus import answer_gpus, check_gpus

            check_gpus(here, options, accounting, steps=steps)
        elif options.device_memory_each:
            raise OptionError(
                "the plan is for one GPU: give one value as --device-memory, or --gpus"
            )
        one_memory = here.link_bytes_per_s is None
        if one_memory and options.host_memory_bytes is not None:
            raise OptionError("there is one memory on a CPU: use --device-memory")
        situation = Situation(
            shape=_shape(model, dtype.value, load_in.value if load_in else None),
            hardware=here,
            context_tokens=parse_tokens(context, "--context"),
            device_memory_bytes=_device_memory_bytes(here, options.device_memory_bytes),
            host_memory_bytes=options.host_memory_bytes or here.host_memory_bytes,
            batch=batch,
            kind=accounting,
            chunk_tokens=None if options.chunk_tokens == "auto" else options.chunk_tokens,
            streaming=_streaming(options),
            host_format=_host_format(options, model, dtype, accounting),
            disk=disk,
            machine_memory_bytes=here.device_memory_bytes
            if one_memory and options.device_memory_bytes is None
            else None,
        )
        if gpus is not None:
            quantising, said = load_in is not None, (which, note)
            code = answer_gpus(situation, gpus, options, said, json_path, quantising=quantising)
            raise typer.Exit(code)
        streams = load_in is None  # bitsandbytes keeps all it quantises on the GPU
        raise typer.Exit(_answer(situation, (which, note), json_path, streams=streams, steps=steps))


def _above_disk(
    here: Hardware, options: Options, accounting: AccountingKind
) -> tuple[Hardware, Disk]:
    """Return a machine with the rates of the disk that a folder is on, and that disk.

    Raises:
        OptionError: nothing can lie below host memory here.
    """
    folder = options.disk_cache or ""
    if here.link_bytes_per_s is None:
        raise OptionError("--disk-cache is below a GPU's CPU memory; leave it out on a CPU")
    if accounting is not AccountingKind.OURS:
        raise OptionError(f"--accounting {accounting.value} knows no disk; leave out --disk-cache")
    mount = mount_of(folder)
    disk = Disk(folder=folder, said=mount.said, free_bytes=free_bytes(folder))
    measurement = read_measurement()
    rate = None if measurement is None else measurement.disk_rate(mount.disk)
    return here.above_disk(rate), disk


def _host_format(
    options: Options, model: str, dtype: DtypeChoice, accounting: AccountingKind
) -> Format:
    """Return the form of tokens in host memory.

    Raises:
        OptionError: the accounting knows dense ones alone; or they are to be packed, and of another
            dtype than bfloat16.
    """
    form = Format.DENSE if options.kv_cache == "auto" else Format(options.kv_cache)
    if form is not Format.DENSE and accounting is not AccountingKind.OURS:
        raise OptionError(
            f"--accounting {accounting.value} counts dense KV alone; leave out --kv-cache"
        )
    if form is not Format.PACKED:
        return form
    if dtype is DtypeChoice.AUTO:
        from headinfer.cli.shapes import dtype_of

        if (named := dtype_of(model)) != "bfloat16":
            raise OptionError(
                f"--kv-cache packed is for bfloat16 alone, and the config of {model!r} names "
                f"{named}; leave out --kv-cache, or give --dtype bfloat16"
            )
    elif dtype is not DtypeChoice.BFLOAT16:
        raise OptionError(
            f"--kv-cache packed is for bfloat16 alone, not {dtype.value}; leave out one of the two"
        )
    return form


def _streaming(options: Options) -> Options:
    """Return what the row of streaming heads is for: half of them unless a share was given."""
    return Options(
        sparsity=options.sparsity or PAPERS_SPARSITY,
        sink_tokens=options.sink_tokens,
        recent_tokens=options.recent_tokens,
    )


def _check_alone(invocation: typer.Context) -> None:
    """Refuse what `--paper` would ignore."""
    for option in invocation.command.params:
        if option.name != "paper" and was_given(invocation, option.name):
            raise OptionError(
                f"--paper prints the paper's tables and nothing else; leave out {option.opts[0]}"
            )


def _device_memory_bytes(here: Hardware, asked: int | None) -> int:
    """Return the memory for weights, KV and activations; on a CPU not all there is."""
    if asked is not None:
        return asked
    if here.link_bytes_per_s is None:
        return HostRoom.of_machine(here.device_memory_bytes, "cpu").kv_bytes
    return here.device_memory_bytes


def _answer(
    situation: Situation,
    which: tuple[str, str | None],
    json_path: str | None,
    *,
    streams: bool,
    steps: bool,
) -> int:
    from headinfer.cli.plan_table import plan_as_json, print_plans, print_steps
    from headinfer.estimate.choose import choose

    plans = method_plans(situation)
    choice = choose(situation, plans, streams=streams)
    if json_path is not None:  # first, in case stdout takes nothing
        write_json(json_path, plan_as_json(situation, plans, choice))
    if json_path != STDOUT:
        print_plans(situation, *which, plans, choice)
        if steps:
            print_steps(situation, choice)
        if json_path is not None:
            stderr_console().print(f"written to {json_path}", markup=False)
    return 0 if choice.plan else _EXIT_NOTHING_FITS


def _shape(name: str, dtype: str, quantised: str | None) -> ModelShape:
    from headinfer.cli.shapes import shape_of

    return shape_of(name, dtype=dtype, quantised=quantised)


def _hardware(name: str | None) -> tuple[Hardware, str, str | None]:
    """Return the machine to plan for, how it came to be, and a note where nobody chose it."""
    if name is not None:
        return hardware_of(name), "as asked for", None
    measured, said = measured_hardware()
    if measured is not None:
        return measured, said, None
    note = (
        f"this machine is {said}; {_DEFAULT_HARDWARE} is assumed: --hardware names another one, "
        "and `headinfer probe` measures this one"
    )
    return preset_hardware(_DEFAULT_HARDWARE), "assumed", note
