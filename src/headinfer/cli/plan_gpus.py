"""`headinfer plan --gpus`: one GPU beside several, split by layers and by heads."""

from collections.abc import Sequence
from typing import Any

from rich.console import Console, JustifyMethod
from rich.markup import escape
from rich.table import Table

from headinfer.cli.console import stderr_console
from headinfer.cli.output import STDOUT, write_json
from headinfer.cli.plan_table import (
    EXIT_NOTHING_FITS,
    changes_as_json,
    disk_as_json,
    free_below,
    gib,
    length,
    marked,
    print_changes,
    print_form,
)
from headinfer.cli.text import print_lines, wrapping_console
from headinfer.estimate.choose_split import SplitChoice, choose_split
from headinfer.estimate.gpus import split_plans
from headinfer.estimate.methods import APPROXIMATE
from headinfer.estimate.situation import Situation
from headinfer.estimate.split_plan import SplitPlan
from headinfer.generation.gpus import Gpus
from headinfer.plan.options import Options
from headinfer.units import counted, counted_tokens, format_bytes, format_seconds

_ON_DISK = "KV on\ndisk"
"""The column that is left out without a disk."""

_COLUMNS = (
    "GPUs",
    "split",
    "method",
    "weights",
    "KV on\nGPU",
    "total",
    "weights\non CPU",
    "KV on\nCPU",
    _ON_DISK,
    "max\ncontext",
    "prefill",
    "decode\n/token",
)


def answer_gpus(
    situation: Situation,
    gpus: int,
    options: Options,
    which: tuple[str, str | None],
    json_path: str | None,
    *,
    quantising: bool,
) -> int:
    """Print what the GPUs do, or write it as JSON; return the exit code.

    Args:
        situation: of one of them.
        gpus: how many.
        options: with the most to use of each.
        which: how the machine came to be, and a note of that.
        json_path: a file for JSON, or "-"; None for none.
        quantising: whether weights are quantised as they are loaded.

    Raises:
        OptionError: memory was given for another number of GPUs, or the model has fewer layers.
    """
    asked = Gpus.of(gpus, options)
    assert asked is not None
    has = situation.hardware.device_memory_bytes
    memory_bytes = [has if given is None else given for given in asked.memory_bytes]
    plans = split_plans(situation, memory_bytes, quantising=quantising)
    choice = choose_split(situation, plans, memory_bytes, quantising=quantising)
    if json_path is not None:
        write_json(json_path, _as_json(situation, plans, choice))
    if json_path != STDOUT:
        _print(situation, memory_bytes, which, plans, choice)
        if json_path is not None:
            stderr_console().print(f"written to {json_path}", markup=False)
    return 0 if choice.plan else EXIT_NOTHING_FITS


def _print(
    situation: Situation,
    memory_bytes: Sequence[int],
    which: tuple[str, str | None],
    plans: Sequence[SplitPlan],
    choice: SplitChoice,
) -> None:
    console = wrapping_console()
    said, note = which
    batch = f", {situation.batch} rows" if situation.batch > 1 else ""
    each = ", ".join(dict.fromkeys(format_bytes(size) for size in memory_bytes))
    console.print(
        f"[bold]{escape(situation.shape.name)}[/], {counted_tokens(situation.context_tokens)}"
        f"{batch}, on {len(memory_bytes)} x [bold]{situation.hardware.name}[/] "
        f"({escape(said)}): {each} of each GPU's memory, "
        f"{format_bytes(situation.host_memory_bytes)} of CPU memory{free_below(situation)}"
    )
    if note is not None:
        console.print(f"[yellow]{escape(note)}[/]")
    console.print(_table(plans, choice, above_disk=situation.disk is not None))
    holding = "GPU and CPU memory" + (" and the disk" if situation.disk else "")
    rounded = any(plan.method in APPROXIMATE for plan in plans)
    console.print(
        "[dim]Sizes in GiB, of the fullest GPU; total: with activations and CUDA itself; [/]"
        f"[red]![/][dim]: more than there is;\n{'~: not exact by design; ' if rounded else ''}"
        f"max context: what {holding} hold; times predicted[/]"
    )
    print_form(console, situation)
    _print_choice(console, choice)


def _print_choice(console: Console, choice: SplitChoice) -> None:
    console.print()
    if choice.plan is None:
        console.print("[bold red]Nothing fits.[/]")
    else:
        gpus = counted(choice.plan.gpus, "GPU")
        split = "" if choice.plan.gpus == 1 else f", split by {choice.plan.split.value}"
        console.print(f"Chosen: [bold green]{gpus}{split}[/]")
    print_lines(console, choice.why)
    print_changes(console, choice.changes)
    if choice.command:
        console.print(f"Run: {choice.command}", markup=False, soft_wrap=True)


def _table(plans: Sequence[SplitPlan], choice: SplitChoice, *, above_disk: bool) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 0, 0, 1), header_style="bold")
    shown = [place for place, name in enumerate(_COLUMNS) if above_disk or name != _ON_DISK]
    for place in shown:
        justify: JustifyMethod = "left" if place in (1, 2) else "right"
        table.add_column(_COLUMNS[place], justify=justify, no_wrap=True)
    for plan in plans:
        chosen = plan is choice.plan
        style = "bold green" if chosen else ("" if plan.fits else "dim")
        cells = _cells(plan)
        table.add_row(*(cells[place] for place in shown), style=style)
    return table


def _cells(plan: SplitPlan) -> list[str]:
    split = "-" if plan.gpus == 1 else plan.split.value
    method = f"{plan.method} ~" if plan.method in APPROXIMATE else plan.method
    if plan.obstacle is not None:
        return [str(plan.gpus), split, method, *["-"] * (len(_COLUMNS) - 3)]
    fullest, short = plan.fullest, bool(plan.host_short_bytes)
    on_host = [plan.weights_host_bytes, plan.kv_host_bytes]
    on_disk = gib(plan.kv_disk_bytes) if plan.kv_disk_bytes else "-"
    return [
        str(plan.gpus),
        split,
        method,
        gib(fullest.weights_bytes),
        gib(fullest.kv_device_bytes),
        marked(gib(fullest.total_bytes), short=bool(fullest.short_bytes)),
        *(marked(gib(size), short=short) if size else "-" for size in on_host),
        marked(on_disk, short=bool(plan.disk_short_bytes)),
        length(plan.max_context_tokens),
        format_seconds(plan.prefill_s) if plan.fits else "-",
        format_seconds(plan.decode_s_per_token) if plan.fits else "-",
    ]


def _as_json(
    situation: Situation, plans: Sequence[SplitPlan], choice: SplitChoice
) -> dict[str, Any]:
    """Return everything as plain values: bytes, tokens and seconds."""
    chosen = next((place for place, plan in enumerate(plans) if plan is choice.plan), None)
    return {
        "model": situation.shape.name,
        "hardware": situation.hardware.name,
        "kv_cache": situation.host_format.value,
        "context_tokens": situation.context_tokens,
        "disk": disk_as_json(situation),
        "plans": [_row(plan) for plan in plans],
        "chosen": chosen,
        "why": list(choice.why),
        "command": choice.command or None,
        "changes": changes_as_json(choice.changes),
    }


def _row(plan: SplitPlan) -> dict[str, Any]:
    row: dict[str, Any] = {
        "gpus": plan.gpus,
        "split": plan.split.value,
        "method": plan.method,
        "fits": plan.fits,
        "obstacle": plan.obstacle,
    }
    if plan.obstacle is not None:
        return row
    return row | {
        "chunk_tokens": plan.chunk_tokens,
        "kv_host_bytes": plan.kv_host_bytes,
        "kv_disk_bytes": plan.kv_disk_bytes,
        "disk_read_bytes": plan.disk_read_bytes,
        "weights_host_bytes": plan.weights_host_bytes,
        "brought_bytes": plan.brought_bytes,
        "disk_bytes": plan.disk_bytes,
        "max_context_tokens": plan.max_context_tokens,
        "prefill_s": plan.prefill_s,
        "decode_s_per_token": plan.decode_s_per_token,
        "reduce_s": plan.reduce_s,
        "each": [
            {
                "layers": use.layers,
                "kv_heads": use.kv_heads,
                "weights_bytes": use.weights_bytes,
                "kv_device_bytes": use.kv_device_bytes,
                "resident_bytes": use.resident_bytes,
                "activation_bytes": use.activation_bytes,
                "kv_host_bytes": use.kv_host_bytes,
                "raw_page_bytes": use.raw_page_bytes,
                "runtime_bytes": use.runtime_bytes,
                "total_device_bytes": use.total_bytes,
                "busy": use.busy,
            }
            for use in plan.uses
        ],
    }
