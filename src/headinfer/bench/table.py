"""Rows as a table for people, 100 columns wide."""

from collections.abc import Iterable, Sequence

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from headinfer.bench.result import Status
from headinfer.bench.rows import Row
from headinfer.bench.spec import BenchSpec
from headinfer.bench.suite import Machine
from headinfer.units import format_bytes, format_tokens

_NOTHING = "-"
_COLUMNS = (
    "context",
    "prefill\ns",
    "x std",
    "decode\nms/token",
    "x std",
    "{} bound",
    "% of\nbound",
    "RSS\ngrowth",
    "KV",
    "planned\nactiv.",
)


def render(spec: BenchSpec, machine: Machine, rows: Sequence[Row]) -> RenderableType:
    """Return the table, with the conditions above it and what did not run below it."""
    what = spec.command.value
    unit = "ms/token" if what == "decode" else "s"
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("method", no_wrap=True)
    for name in _COLUMNS:
        heading = f"{what}\nbound {unit}" if name == "{} bound" else name
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(row.method, *_cells(row, decodes=what == "decode"))
    notes = [Text(f"{row.method}: {_note(row)}") for row in rows if row.status is not Status.OK]
    return Group(*map(Text, _conditions(spec, machine)), table, *notes)


def _conditions(spec: BenchSpec, machine: Machine) -> Iterable[str]:
    model, rates = spec.model, machine.rates
    yield (
        f"Llama, random weights: {model.layers} layers, hidden {model.hidden_size}, {model.heads} "
        f"query and {model.kv_heads} KV heads of {model.head_dim}, {spec.dtype}"
    )
    hardware = machine.hardware
    yield f"{hardware['gpu'] or hardware['cpu']}, {hardware['torch_threads']} CPU threads"
    parts = [
        f"host memory {rates.host_bytes_per_s / 1e9:.1f} GB/s",
        f"matmul {rates.matmul_flops_per_s / 1e9:.0f} GFLOP/s",
    ]
    if rates.device_bytes_per_s and rates.link_bytes_per_s:
        parts.append(f"device memory {rates.device_bytes_per_s / 1e9:.0f} GB/s")
        parts.append(f"link {rates.link_bytes_per_s / 1e9:.1f} GB/s")
    yield f"measured: {', '.join(parts)}"
    yield (
        f"medians of {spec.repeats} fresh process{'es' * (spec.repeats > 1)} a method, "
        f"{spec.new_tokens} decode step{'s' * (spec.new_tokens > 1)} each; cache filled by prefill"
    )


def _cells(row: Row, *, decodes: bool) -> Iterable[str]:
    yield format_tokens(row.context_tokens)
    yield _number(row.prefill_s)
    yield _ratio(row.prefill_x_standard)
    yield _number(row.decode_s_per_token, 1000)
    yield _ratio(row.decode_x_standard)
    yield _number(row.bound_s, 1000 if decodes else 1)
    yield _NOTHING if row.bound_fraction is None else f"{row.bound_fraction:.0%}"
    for size_bytes in (row.peak_rss_growth_bytes, row.kv_bytes, row.planned_activation_bytes):
        yield _NOTHING if size_bytes is None else _size(size_bytes)


def _number(value: float | None, factor: float = 1) -> str:
    """Return three significant digits, and all before the point."""
    if value is None:
        return _NOTHING
    value *= factor
    decimals = next((digits for limit, digits in ((1, 3), (10, 2), (100, 1)) if value < limit), 0)
    return f"{value:.{decimals}f}"


def _ratio(value: float | None) -> str:
    return _NOTHING if value is None else f"{value:.2f}" if value < 10 else f"{value:.1f}"


def _size(size_bytes: int) -> str:
    """Return a size with its unit in short, to save columns: 1.50G is 1.50 GiB."""
    number, unit = format_bytes(size_bytes).split()
    return f"{float(number):.3g}{unit.removesuffix('B').removesuffix('i')}"


def _note(row: Row) -> str:
    meaning = {
        Status.MISMATCH: "WRONG RESULT",
        Status.UNCHECKED: "not checked",
        Status.CANNOT_RUN: "cannot run",
        Status.FAILED: "failed",
    }
    return f"{meaning[row.status]}: {row.reason}"
