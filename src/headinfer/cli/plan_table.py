"""What `headinfer plan` prints: the methods as a table and as JSON, and the choice below them."""

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from headinfer.cli.text import WIDTH, print_lines, wrapping_console
from headinfer.estimate.choose import Change, Choice
from headinfer.estimate.methods import APPROXIMATE
from headinfer.estimate.situation import MethodPlan, Situation
from headinfer.plan.memory import runtime_parts
from headinfer.units import counted_tokens, format_bytes, format_seconds, format_tokens

EXIT_NOTHING_FITS = 1
"""The exit code of plans by which nothing fits."""

_GIB = 2**30
_COLUMNS = (
    "method",
    "tile",
    "weights",
    "KV on\nGPU",
    "activ-\nations",
    "total",
    "KV\nin all",
    "KV on\nCPU",
    "KV on\ndisk",
    "max\ncontext",
    "prefill",
    "decode\n/token",
)
_LEFT_OUT = ("weights", "KV\nin all")
"""Columns that narrow terminals do without: they differ least between methods."""

_ONE_MEMORY = {"KV on\nGPU": "KV in\nmemory"}
"""Headings where the CPU is the device, and nothing is said of a host."""

_ROOMY = 110
"""Columns from which on the table's columns stand two spaces apart."""


def print_plans(
    situation: Situation,
    which: str,
    note: str | None,
    plans: Sequence[MethodPlan],
    choice: Choice,
) -> None:
    """Print the situation, a row for each method, and what was chosen and why.

    Args:
        situation: planned for.
        which: how its machine came to be.
        note: more of that, if there is more to say.
        plans: of all methods.
        choice: among them.
    """
    console = wrapping_console()
    hardware, batch = situation.hardware, situation.batch
    rows = f", {batch} rows" if batch > 1 else ""
    console.print(
        f"[bold]{escape(situation.shape.name)}[/], {counted_tokens(situation.context_tokens)}"
        f"{rows}, on [bold]{hardware.name}[/] ({escape(which)}): "
        f"{_memory(situation)}"
    )
    if note is not None:
        console.print(f"[yellow]{escape(note)}[/]")
    on_cpu = situation.device == "cpu"
    above_disk = situation.disk is not None
    console.print(_table(plans, choice, console.width, on_cpu=on_cpu, above_disk=above_disk))
    runtime = plans[0].runtime_bytes
    console.print(
        f"[dim]Sizes in GiB{f'; total: with {gib(runtime)} for CUDA itself' if runtime else ''}; "
        "[/][red]![/][dim]: more than there is;\n~: not exact by design; max context: what "
        f"{_holding(situation)}; times predicted[/]"
    )
    print_form(console, situation)
    if runtime:
        parts = runtime_parts(situation.device).items()
        told = ", ".join(f"{name} {gib(num_bytes)}" for name, num_bytes in parts)
        console.print(f"[dim]CUDA itself: {told}[/]")
    _print_choice(console, choice)


def print_form(console: Console, situation: Situation, where: str = "") -> None:
    """Print how tokens of our exact methods lie in CPU memory, where they are not dense.

    Args:
        console: prints.
        situation: of a machine.
        where: names those machines that it is so on; empty for all.
    """
    shape = situation.of_ours().shape
    if shape.packs:
        form, share = shape.host_format.value, shape.packed_share
        console.print(f"[dim]KV on CPU{where}: {form} in our methods, {share:.2f} of its bytes[/]")


def print_steps(situation: Situation, choice: Choice) -> None:
    """Print what the chosen method does, layer by layer, in a decode step and in the last chunk."""
    from headinfer.estimate.steps import disk_line, pass_schedule

    plan, context = choice.plan, situation.context_tokens
    if plan is None:
        lines = ["", "No steps to print: no method was chosen."]
    else:
        chunk = min(plan.chunk_tokens or context, context)
        passes = (
            ("A decode step", context, 1),
            (f"The last chunk of {counted_tokens(chunk)}", context - chunk, chunk),
        )
        lines = []
        for name, past, new in passes:
            lines += ["", f"{name}, behind {counted_tokens(past)}:"]
            lines += pass_schedule(situation, plan, past, new).lines()
            lines += filter(None, [disk_line(situation, plan, past, new)])
    console = wrapping_console()
    for line in lines:
        console.print(line, markup=False, soft_wrap=True)


def _memory(situation: Situation) -> str:
    device = format_bytes(situation.device_memory_bytes)
    if situation.device == "cpu":
        return f"{device} of memory"
    text = f"{device} of GPU memory, {format_bytes(situation.host_memory_bytes)} of CPU memory"
    return text + free_below(situation)


def free_below(situation: Situation) -> str:
    """Say how much room there is on a disk below CPU memory; nothing without one."""
    if situation.disk is None:
        return ""
    free = format_bytes(situation.disk.free_bytes)
    return f", {free} free below ({escape(situation.disk.said)})"


def _holding(situation: Situation) -> str:
    """Say what holds the longest context."""
    if situation.device == "cpu":
        return "memory holds"
    return "GPU and CPU memory hold" + (", with the disk" if situation.disk else "")


def _table(
    plans: Sequence[MethodPlan], choice: Choice, width: int, *, on_cpu: bool, above_disk: bool
) -> Table:
    gap = 2 if width >= _ROOMY else 1
    table = Table(box=None, pad_edge=False, padding=(0, 0, 0, gap), header_style="bold")
    columns = {name: index for index, name in enumerate(_COLUMNS) if name not in _LEFT_OUT}
    if width >= WIDTH:
        columns = {name: index for index, name in enumerate(_COLUMNS)}
    if above_disk:
        columns.pop("KV\nin all", None)  # where the other one comes
    else:
        del columns["KV on\ndisk"]
    if on_cpu:
        del columns["KV on\nCPU"]
    for name, index in columns.items():
        heading = _ONE_MEMORY.get(name, name) if on_cpu else name
        table.add_column(heading, justify="right" if index else "left", no_wrap=True)
    chosen = choice.plan.method if choice.plan else None
    for plan in plans:
        style = "bold green" if plan.method == chosen else ("" if plan.fits else "dim")
        cells = _cells(plan, chosen=plan.method == chosen)
        table.add_row(*(cells[index] for index in columns.values()), style=style)
    return table


def _cells(plan: MethodPlan, *, chosen: bool) -> list[str]:
    host = gib(plan.kv_host_bytes) if plan.kv_host_bytes else "-"
    disk = gib(plan.kv_disk_bytes) if plan.kv_disk_bytes else "-"
    return [
        f"{'> ' if chosen else '  '}{plan.method}{' ~' if plan.method in APPROXIMATE else ''}",
        _tile(plan),
        gib(plan.weights_bytes),
        gib(plan.kv_device_bytes),
        gib(plan.activation_bytes),
        marked(gib(plan.total_device_bytes), short=bool(plan.device_short_bytes)),
        gib(plan.kv_total_bytes),
        marked(host, short=bool(plan.host_short_bytes)),
        marked(disk, short=bool(plan.disk_short_bytes)),
        length(plan.max_context_tokens),
        format_seconds(plan.prefill_s) if plan.fits else "-",
        format_seconds(plan.decode_s_per_token) if plan.fits else "-",
    ]


def _tile(plan: MethodPlan) -> str:
    if plan.tile_heads is None:
        return "-"
    tokens = "all" if plan.tile_tokens is None else format_tokens(plan.tile_tokens)
    return f"{plan.tile_heads} x {tokens}"


def gib(num_bytes: int) -> str:
    """Return three digits, or all in front of the point."""
    size = num_bytes / _GIB
    if size >= 99.95:
        return f"{size:,.0f}"
    return f"{size:.1f}" if size >= 9.995 else f"{size:.2f}"


def marked(text: str, *, short: bool) -> str:
    """Return a size with a mark where there is less."""
    return f"[not dim red]{text}![/]" if short else text


def length(tokens: int | None) -> str:
    """Return a length rounded down, as people say it: 703K, 8.07M."""
    if tokens is None:
        return "no limit"
    if tokens >= 2**20:
        return f"{tokens * 100 // 2**20 / 100:.2f}".rstrip("0").rstrip(".") + "M"
    return f"{tokens // 1024}K" if tokens >= 1024 else str(tokens)


def _print_choice(console: Console, choice: Choice) -> None:
    console.print()
    if choice.plan:
        console.print(f"Chosen: [bold green]{choice.plan.method}[/]")
    else:
        console.print("[bold red]No exact method fits.[/]")
    print_lines(console, choice.why)
    print_changes(console, choice.changes)


def print_changes(console: Console, changes: Sequence[Change]) -> None:
    """Print what would help where nothing fits."""
    if changes:
        console.print("What would do:" if len(changes) == 1 else "Either of these would do:")
        print_lines(console, (change.line for change in changes))


def plan_as_json(
    situation: Situation, plans: Sequence[MethodPlan], choice: Choice
) -> dict[str, Any]:
    """Return everything as plain values: bytes, tokens and seconds.

    `tile_heads` and `tile_tokens` are null where nothing is offloaded, and "all" where a tile has
    all tokens. `disk` is null without one below CPU memory. `chosen` is a method's row with its
    chunk and the reasons; where nothing fits its `method` is null and `changes` says what would.
    """
    chosen: dict[str, Any] = {"method": None, "why": list(choice.why)}
    if choice.plan:
        chosen = _row(choice.plan) | {
            "chunk_tokens": choice.plan.chunk_tokens,
            "resident_bytes": choice.plan.resident_bytes,
            "answer_resident_bytes": choice.plan.answer_resident_bytes,
            "disk_read_bytes": choice.plan.disk_read_bytes,
            "why": list(choice.why),
        }
    else:
        chosen["changes"] = changes_as_json(choice.changes)
    return {
        "model": situation.shape.name,
        "hardware": situation.hardware.name,
        "kv_cache": situation.host_format.value,
        "context_tokens": situation.context_tokens,
        "disk": disk_as_json(situation),
        "methods": [_row(plan) for plan in plans],
        "chosen": chosen,
    }


def changes_as_json(changes: Sequence[Change]) -> list[dict[str, int | None]]:
    """Return what would help as plain values; null for what each leaves as it is."""
    return [
        {
            "device_memory_bytes": change.device_memory_bytes,
            "host_memory_bytes": change.host_memory_bytes,
            "context_tokens": change.context_tokens,
            "gpus": change.gpus,
        }
        for change in changes
    ]


def disk_as_json(situation: Situation) -> dict[str, Any] | None:
    """Return the disk below CPU memory; None where there is none."""
    disk, hardware = situation.disk, situation.hardware
    if disk is None:
        return None
    return {
        "folder": disk.folder,
        "file_system": disk.said,
        "free_bytes": disk.free_bytes,
        "read_bytes_per_s": hardware.disk_read_bytes_per_s,
        "write_bytes_per_s": hardware.disk_write_bytes_per_s,
        "measured": hardware.disk_measured,
    }


def _row(plan: MethodPlan) -> dict[str, Any]:
    return {
        "method": plan.method,
        "tile_heads": plan.tile_heads,
        "tile_tokens": "all" if plan.tile_heads and not plan.tile_tokens else plan.tile_tokens,
        "weights_bytes": plan.weights_bytes,
        "kv_device_bytes": plan.kv_device_bytes,
        "activation_bytes": plan.activation_bytes,
        "runtime_bytes": plan.runtime_bytes,
        "total_device_bytes": plan.total_device_bytes,
        "kv_total_bytes": plan.kv_total_bytes,
        "kv_host_bytes": plan.kv_host_bytes,
        "kv_disk_bytes": plan.kv_disk_bytes,
        "max_context_tokens": plan.max_context_tokens,
        "prefill_s": plan.prefill_s,
        "decode_s_per_token": plan.decode_s_per_token,
    }
