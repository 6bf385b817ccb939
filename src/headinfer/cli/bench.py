"""`headinfer bench`: speed and memory beside what people use instead, checked and bounded."""

import inspect
from pathlib import Path
from typing import Any

import typer
from rich.table import Table

from headinfer.bench.catalogue import CATALOGUE
from headinfer.bench.document import Results
from headinfer.bench.launch import FreshProcesses, Launcher
from headinfer.bench.spec import BenchSpec, Command
from headinfer.bench.suite import Suite
from headinfer.bench.table import render
from headinfer.cli.bench_options import options, run_spec
from headinfer.cli.bench_report import report
from headinfer.cli.command import Group, OnceCommand
from headinfer.cli.console import reporting_errors
from headinfer.cli.output import JsonCommand, check_results
from headinfer.cli.results import collect, exit_code, save, tell, tell_kept
from headinfer.cli.run_progress import RunProgress, run_console, showing_progress
from headinfer.cli.text import wrapping_console
from headinfer.generation.model import choose_device

app = typer.Typer(
    cls=Group,
    help="Measure speed and memory beside what people use instead, on this machine.",
    no_args_is_help=True,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

_OURS = (
    "head-wise-8, head-wise-4, head-wise-2, head-wise-1, adaptive, bounded, resident, "
    "host-attention"
)
_STOCK = "standard, chunked-prefill, transformers-offloaded, kv-4bit"


def make_launcher() -> Launcher:
    """Return what runs the trials."""
    return FreshProcesses()


_EXIT = "Exit code 1 when a result is wrong or nothing could be measured."


def _verb(command: Command, help_text: str, *fixed: str, **defaults: Any) -> None:
    """Add a verb.

    Args:
        command: what it looks for.
        help_text: its help.
        fixed: options that it does not have; they keep their defaults.
        defaults: of options, where it has others.
    """
    signature = inspect.signature(options)
    parameters = [
        parameter.replace(default=defaults.get(name, parameter.default))
        for name, parameter in signature.parameters.items()
    ]
    unchanged = {part.name: part.default for part in parameters if part.name in fixed}

    def run(**given: Any) -> None:
        with reporting_errors():
            _run(command, unchanged | given)

    run.__doc__ = f"{help_text}\n\n{_EXIT}"
    run.__annotations__ = {**options.__annotations__}
    shown = [part for part in parameters if part.name not in fixed]
    run.__signature__ = signature.replace(parameters=shown)  # type: ignore[attr-defined]
    app.command(command.value, cls=JsonCommand)(run)


_verb(Command.DECODE, "Time decode steps behind a full cache.")
_verb(
    Command.PREFILL,
    "Time the prefill of a prompt, and one decode step to see that the cache works.",
    "fill",
    "new_tokens",
    new_tokens=1,
)
_verb(
    Command.MEMORY,
    "Measure the memory that prefill and decode take.",
    "repeats",
    "gpus",
    methods=f"{_STOCK}, {_OURS}, headinfer",
    new_tokens=2,
)
_verb(
    Command.MAX_CONTEXT,
    "Find the longest context that runs, by running it: doubled until it fails, then bisected. "
    "--contexts are the first and the longest to try. With --fill random all of the prompt but its "
    "last pass through the model is random keys and values.",
    "repeats",
    contexts="1K,1M",
    methods=f"{_STOCK}, {_OURS}, headinfer",
    new_tokens=1,
    time_limit=600,
)
_verb(
    Command.ABLATION,
    "Time HeadInfer with one part of it left out or fixed at a time.",
    "gpus",
    methods=f"standard, {_OURS}, synchronous, headinfer",
)


@app.command()
def methods() -> None:
    """Print the methods and what they are."""
    table = Table(box=None, pad_edge=False, show_header=False)
    for info in CATALOGUE.values():
        table.add_row(info.name, info.description.replace("`", ""))
    wrapping_console().print(table)


app.command(cls=OnceCommand)(report)


def _run(command: Command, given: dict[str, Any]) -> None:
    spec = run_spec(command, given)
    choose_device(spec.settings.device)
    path: str | None = given["json_path"]
    check_results(path, resume=given["resume"])
    console = run_console()
    with showing_progress(console) as progress:
        launcher = make_launcher()
        results = _begin(spec, launcher, progress, path if given["resume"] else None)
        suite = Suite(
            results.spec,
            launcher,
            results.machine.rates,
            progress,
            done=results.done,
            checks=results.checks,
            unfinished=results.unfinished,
            noted=lambda: save(results, path),
        )
        stopped = collect(suite.run(), results.rows.append, results, path)
    if stopped is not None and not results.rows:
        if results.checks or results.unfinished:
            tell_kept(path, console)
        raise stopped
    tell(
        results,
        lambda: render(results.spec, results.machine, results.arranged_rows),
        path,
        console,
        stopped=stopped is not None,
    )
    if stopped is not None:
        raise stopped
    raise typer.Exit(exit_code(row.status for row in results.arranged_rows))


def _begin(spec: BenchSpec, launcher: Launcher, progress: RunProgress, path: str | None) -> Results:
    """Return the results of an earlier run to go on with, or those of one that begins."""
    if path is not None and Path(path).exists():
        progress.started("looking at the machine", None)
        return Results.load(path).continued(spec, launcher.identity(spec.settings.device))
    progress.started("measuring the machine", None)
    machine = launcher.machine(spec.settings.device, spec.dtype, spec.gpus)
    if spec.settings.disk_cache is not None:
        progress.started("measuring the disk", None)
        machine = launcher.above_disk(machine, spec.settings.disk_cache)
    return Results.new(spec, machine)
