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
from headinfer.cli.plan_question import (
    ALL,
    Question,
    check_alike,
    host_format_of,
    parse_counts,
    parse_machines,
)
from headinfer.errors import OptionError
from headinfer.estimate.accounting import AccountingKind
from headinfer.estimate.machines import HARDWARE, preset_hardware
from headinfer.estimate.methods import method_plans
from headinfer.estimate.situation import Situation
from headinfer.plan.hardware import THIS, Hardware
from headinfer.units import parse_tokens

_DEFAULT_HARDWARE = "rtx-4090"
_MOST_ROWS = 2**16


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
    kv_cache="How the KV cache lies in CPU memory, in our methods: dense, packed, or auto for the "
    "one that attach would choose there. int8 and fp8 are a method more, which is approximate.",
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
        str | None,
        typer.Option(
            "--gpus",
            metavar="COUNT",
            help="Plan for so many GPUs: what fits, which split is faster, beside one. Weights "
            "that the GPUs do not hold stay in CPU memory. Several, such as 1,2,4, are compared.",
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
            help=f"{', '.join(HARDWARE)}, or {THIS}: as measured by `headinfer probe`, which is "
            f"the default where it was; otherwise {_DEFAULT_HARDWARE}. Several of them, with "
            f"commas, or {ALL} but {THIS}, are compared.",
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
        counts = parse_counts(gpus)
        machines = [_hardware(each) for each in parse_machines(hardware)]
        check_alike([here for here, _, _ in machines], counts, options, accounting, steps=steps)
        from headinfer.cli.shapes import shape_of

        question = Question(
            shape=shape_of(model, dtype=dtype.value, quantised=load_in.value if load_in else None),
            context_tokens=parse_tokens(context, "--context"),
            batch=batch,
            options=options,
            accounting=accounting,
            host_format=host_format_of(options, model, dtype, accounting, counts),
        )
        asked = [(question.on(here), (which, note)) for here, which, note in machines]
        quantising = load_in is not None
        if len(asked) > 1 or len(counts) > 1:
            from headinfer.cli.plan_machines import answer_machines

            code = answer_machines(asked, counts, options, json_path, quantising=quantising)
        elif counts:
            from headinfer.cli.plan_gpus import answer_gpus

            ((situation, said),) = asked
            code = answer_gpus(
                *(situation, counts[0], options, said, json_path), quantising=quantising
            )
        else:
            # bitsandbytes keeps all it quantises on the GPU.
            code = _answer(*asked[0], json_path, streams=not quantising, steps=steps)
        raise typer.Exit(code)


def _check_alone(invocation: typer.Context) -> None:
    """Refuse what `--paper` would ignore."""
    for option in invocation.command.params:
        if option.name != "paper" and was_given(invocation, option.name):
            raise OptionError(
                f"--paper prints the paper's tables and nothing else; leave out {option.opts[0]}"
            )


def _answer(
    situation: Situation,
    which: tuple[str, str | None],
    json_path: str | None,
    *,
    streams: bool,
    steps: bool,
) -> int:
    from headinfer.cli.plan_table import (
        EXIT_NOTHING_FITS,
        plan_as_json,
        print_plans,
        print_steps,
    )
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
    return 0 if choice.plan else EXIT_NOTHING_FITS


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
