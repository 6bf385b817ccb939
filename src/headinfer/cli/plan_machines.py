"""`headinfer plan` for several machines, or numbers of GPUs: a row for each, to compare them."""

from collections.abc import Iterator, Sequence
from typing import Any

from rich.console import Console, JustifyMethod
from rich.markup import escape
from rich.table import Table

from headinfer.cli.console import stderr_console
from headinfer.cli.output import STDOUT, write_json
from headinfer.cli.plan_table import (
    EXIT_NOTHING_FITS,
    disk_as_json,
    free_below,
    gib,
    length,
    print_form,
)
from headinfer.cli.text import print_lines, wrapping_console
from headinfer.estimate.choose import position_warning
from headinfer.estimate.machine_rows import MachineRow, gpus_row, machine_row
from headinfer.estimate.situation import Situation
from headinfer.estimate.split_plan import Split
from headinfer.generation.gpus import Gpus
from headinfer.plan.options import Options
from headinfer.units import counted_tokens, format_seconds

_BROUGHT = "weights\noff GPU"
"""The column that is left out where the GPUs hold all weights."""

_COLUMNS = (
    "hardware",
    "GPUs",
    "GPU\nmemory",
    "CPU\nmemory",
    "split",
    "method",
    _BROUGHT,
    "max\ncontext",
    "prefill",
    "decode\n/token",
)
_WORDS = ("hardware", "split", "method")

Asked = tuple[Situation, tuple[str, str | None]]
"""A situation on one machine, how that came to be, and a note of it."""


def answer_machines(
    asked: Sequence[Asked],
    counts: Sequence[int],
    options: Options,
    json_path: str | None,
    *,
    quantising: bool,
) -> int:
    """Print what each machine does with each number of GPUs, or write it as JSON.

    Args:
        asked: on each machine.
        counts: of GPUs; none for one device that has all weights.
        options: with the most to use of each GPU.
        json_path: a file for JSON, or "-"; None for none.
        quantising: whether weights are quantised as they are loaded.

    Returns:
        The exit code: 1 where nothing fits anywhere.

    Raises:
        OptionError: memory was given for another number of GPUs.
    """
    rows = [
        row
        for situation, _ in asked
        for row in _rows(situation, counts, options, quantising=quantising)
    ]
    fitting = [row for row in rows if row.fits]
    best = min(fitting, key=lambda row: row.answer_s, default=None)
    if json_path is not None:
        write_json(json_path, _as_json(rows, best))
    if json_path != STDOUT:
        _print(asked, rows, best)
        if json_path is not None:
            stderr_console().print(f"written to {json_path}", markup=False)
    return 0 if fitting else EXIT_NOTHING_FITS


def _rows(
    situation: Situation, counts: Sequence[int], options: Options, *, quantising: bool
) -> list[MachineRow]:
    if not counts:
        return [machine_row(situation)]
    has, rows = situation.hardware.device_memory_bytes, []
    for count in counts:
        asked = Gpus.of(count, options)
        assert asked is not None
        memory_bytes = [has if given is None else given for given in asked.memory_bytes]
        rows.append(gpus_row(situation, memory_bytes, quantising=quantising))
    return rows


def _print(asked: Sequence[Asked], rows: Sequence[MachineRow], best: MachineRow | None) -> None:
    console = wrapping_console()
    situation = asked[0][0]
    batch = f", {situation.batch} rows" if situation.batch > 1 else ""
    console.print(
        f"[bold]{escape(situation.shape.name)}[/], {counted_tokens(situation.context_tokens)}"
        f"{batch}, by the best method of each machine{free_below(situation)}"
    )
    for note in dict.fromkeys(note for _, (_, note) in asked if note is not None):
        console.print(f"[yellow]{escape(note)}[/]")
    console.print(_table(rows, best))
    console.print(
        "[dim]Memory in GiB, of each GPU and of the CPU; max context: what they hold"
        f"{', with the disk' if situation.disk else ''}; times predicted[/]"
    )
    if any(row.brought_bytes for row in rows):
        console.print("[dim]weights off GPU: in GiB, they cross the link for each token[/]")
    _print_form(console, [each for each, _ in asked if each.device != "cpu"])
    _print_choice(console, rows, best)


def _print_form(console: Console, situations: Sequence[Situation]) -> None:
    packing = [each for each in situations if each.of_ours().shape.packs]
    if packing:
        some = len(packing) < len(situations)
        names = ", ".join(each.hardware.name for each in packing)
        print_form(console, packing[0], f" of {names}" if some else "")


def _print_choice(console: Console, rows: Sequence[MachineRow], best: MachineRow | None) -> None:
    console.print()
    if best is None:
        console.print("[bold red]Nothing fits.[/]")
    else:
        console.print(f"Fastest with a short answer: [bold green]{_name(best)}[/]")
    print_lines(console, [*_lacking(rows), *position_warning(rows[0].situation)])


def _lacking(rows: Sequence[MachineRow]) -> Iterator[str]:
    """Say why rows do not fit: all that lack the same in one line."""
    found: dict[str, dict[str, list[str]]] = {}
    for row in rows:
        if not row.fits:
            counts = found.setdefault(row.lacking, {})
            counts.setdefault(row.situation.hardware.name, []).append(str(row.gpus))
    for lacking, counts in found.items():
        names = (f"{', '.join(gpus)} x {name}" for name, gpus in counts.items())
        yield f"{'; '.join(names)}: {lacking}"


def _name(row: MachineRow) -> str:
    return f"{row.gpus} x {row.situation.hardware.name}"


def _table(rows: Sequence[MachineRow], best: MachineRow | None) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 0, 0, 1), header_style="bold")
    shown = [
        place
        for place, name in enumerate(_COLUMNS)
        if name != _BROUGHT or any(row.brought_bytes for row in rows)
    ]
    for name in (_COLUMNS[place] for place in shown):
        justify: JustifyMethod = "left" if name in _WORDS else "right"
        table.add_column(name, justify=justify, no_wrap=True)
    for row in rows:
        style = "bold green" if row is best else ("" if row.fits else "dim")
        cells = _cells(row)
        table.add_row(*(cells[place] for place in shown), style=style)
    return table


def _cells(row: MachineRow) -> list[str]:
    each = dict.fromkeys(gib(size) for size in row.memory_bytes)
    on_cpu, on_host = row.situation.device == "cpu", row.situation.host_memory_bytes
    if on_cpu:
        on_host = row.situation.machine_memory_bytes or row.situation.device_memory_bytes
    return [
        row.situation.hardware.name,
        "-" if on_cpu else str(row.gpus),
        "-" if on_cpu else ", ".join(each),
        gib(on_host),
        "-" if row.split is Split.NONE else row.split.value,
        row.method or "-",
        gib(row.brought_bytes) if row.brought_bytes else "-",
        length(row.max_context_tokens),
        format_seconds(row.prefill_s) if row.fits else "-",
        format_seconds(row.decode_s_per_token) if row.fits else "-",
    ]


def _as_json(rows: Sequence[MachineRow], best: MachineRow | None) -> dict[str, Any]:
    """Return everything as plain values: bytes, tokens and seconds; `fastest` is a row's place.

    `kv_cache` is "auto" where machines have different forms, which their rows name.
    """
    situation = rows[0].situation
    forms = {row.situation.host_format.value for row in rows}
    return {
        "model": situation.shape.name,
        "kv_cache": forms.pop() if len(forms) == 1 else "auto",
        "context_tokens": situation.context_tokens,
        "batch": situation.batch,
        "disk": disk_as_json(situation),
        "rows": [_row(row) for row in rows],
        "fastest": next((place for place, row in enumerate(rows) if row is best), None),
    }


def _row(row: MachineRow) -> dict[str, Any]:
    return {
        "hardware": row.situation.hardware.name,
        "gpus": row.gpus,
        "kv_cache": row.situation.host_format.value,
        "device_memory_bytes": list(row.memory_bytes),
        "host_memory_bytes": row.situation.host_memory_bytes,
        "fits": row.fits,
        "method": row.method,
        "split": row.split.value,
        "brought_bytes": row.brought_bytes,
        "max_context_tokens": row.max_context_tokens,
        "prefill_s": row.prefill_s if row.fits else None,
        "decode_s_per_token": row.decode_s_per_token if row.fits else None,
        "lacking": row.lacking or None,
    }
