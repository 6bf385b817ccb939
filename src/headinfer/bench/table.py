"""Rows as a table for people, 100 columns wide; in less, it comes in parts."""

from collections.abc import Callable, Iterable, Sequence

from rich import box
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.table import Table
from rich.text import Text

from headinfer.bench.held import DENSE
from headinfer.bench.launch import Machine
from headinfer.bench.result import Status
from headinfer.bench.rows import NOISY_CPU_SHARE, Row
from headinfer.bench.spec import BenchSpec, Command, Fill
from headinfer.units import counted, exact_bytes, format_bytes, format_seconds, format_tokens

_NOTHING = "-"
_ANY_WIDTH = 10_000

Column = tuple[str, Callable[[Row], str]]
"""A heading, and what a row has under it."""


def number(value: float | None, factor: float = 1) -> str:
    """Return three significant digits, and all before the point; "-" for None."""
    if value is None:
        return _NOTHING
    value *= factor
    decimals = next((digits for limit, digits in ((1, 3), (10, 2), (100, 1)) if value < limit), 0)
    return f"{value:.{decimals}f}"


def size(size_bytes: int | None) -> str:
    """Return a size with its unit in short, to save columns: 1.50G is 1.50 GiB."""
    if size_bytes is None:
        return _NOTHING
    figure, unit = format_bytes(size_bytes).split()
    value = float(figure)
    shown = f"{value:.3g}" if value < 1000 else f"{value:.0f}"  # which .3g writes as 1e+03
    return shown + unit.removesuffix("B").removesuffix("i")


def _ratio(value: float | None) -> str:
    return _NOTHING if value is None else f"{value:.2f}" if value < 10 else f"{value:.1f}"


def _share(value: float | None) -> str:
    return _NOTHING if value is None else f"{value:.0%}"


_CONTEXT: Column = ("context", lambda row: format_tokens(row.context_tokens))
_TIMES: tuple[Column, ...] = (
    ("prefill\ns", lambda row: number(row.prefill_s)),
    ("x std", lambda row: _ratio(row.prefill_x_standard)),
    ("decode\nms/token", lambda row: number(row.decode_s_per_token, 1000)),
    ("x std", lambda row: _ratio(row.decode_x_standard)),
)
_GROWTH: Column = ("RSS\ngrowth", lambda row: size(row.peak_rss_growth_bytes))
_KV: Column = ("KV", lambda row: size(row.kv_bytes))
_SIZES: tuple[Column, ...] = (
    _KV,
    ("KV on\nhost", lambda row: size(row.kv_host_bytes)),
    ("KV on\ndevice", lambda row: size(row.kv_device_bytes)),
    ("planned\nactiv.", lambda row: size(row.planned_activation_bytes)),
    _GROWTH,
)
_PEAKS: tuple[Column, ...] = (
    ("device\nalloc.", lambda row: size(row.device_peak_allocated_bytes)),
    ("device\nreserved", lambda row: size(row.device_peak_reserved_bytes)),
)


def _columns(spec: BenchSpec) -> tuple[Column, ...]:
    command = spec.command
    if command is Command.MEMORY:
        return (_CONTEXT, *_SIZES, *_PEAKS)
    if command is Command.MAX_CONTEXT:
        return (("longest", _CONTEXT[1]), *_SIZES[:3], _GROWTH, *_PEAKS)
    prefills = command.times_prefill
    dense: Column = (
        "x\ndense",
        lambda row: _ratio(row.prefill_x_dense if prefills else row.decode_x_dense),
    )
    unit = "s" if prefills else "ms/token"
    return (
        _CONTEXT,
        *_TIMES,
        *([dense] if spec.compares_forms else []),
        (f"bound\n{unit}", lambda row: number(row.bound_s, 1 if prefills else 1000)),
        ("% of\nbound", lambda row: _share(row.bound_fraction)),
        _GROWTH,
        _KV,
    )


def render(spec: BenchSpec, machine: Machine, rows: Sequence[Row]) -> RenderableType:
    """Return the table, with the conditions above it and what did not run below it."""
    table = _Parts(spec, rows)
    return Group(*map(Text, conditions(spec, machine)), table, *map(Text, notes(spec, rows)))


class _Parts:
    """A table that is cut between columns where a console is too narrow, and not within figures.

    Args:
        spec: of the run.
        rows: that were measured.
    """

    def __init__(self, spec: BenchSpec, rows: Sequence[Row]) -> None:
        self._spec, self._rows = spec, rows

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Yield tables of as many columns as fit, each with the methods and the contexts."""
        first, *others = _columns(self._spec)
        part: list[Column] = [first]
        for column in others:
            wider = self._table([*part, column])
            needed = console.measure(wider, options=options.update_width(_ANY_WIDTH)).maximum
            if needed > options.max_width and len(part) > 1:
                yield self._table(part)
                part = [first]
            part.append(column)
        yield self._table(part)

    def _table(self, columns: Sequence[Column]) -> Table:
        table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
        table.add_column("method", no_wrap=True)
        for heading, _ in columns:
            table.add_column(heading, justify="right", no_wrap=True)
        for row in self._rows:
            name = self._spec.name_of(row.variant)
            table.add_row(name, *(cell(row) for _, cell in columns))
        return table


def conditions(spec: BenchSpec, machine: Machine) -> Iterable[str]:
    """Yield what the rows were measured on and how, in a few lines."""
    rates, hardware = machine.rates, machine.hardware
    yield f"{spec.model.description}, {spec.dtype}"
    cards = f"{spec.gpus} x " if spec.gpus > 1 and hardware["gpu"] else ""
    threads = counted(hardware["torch_threads"], "CPU thread")
    yield f"{cards}{hardware['gpu'] or hardware['cpu']}, {threads}"
    parts = [
        f"CPU memory {rates.host_bytes_per_s / 1e9:.1f} GB/s",
        f"matmul {rates.matmul_flops_per_s / 1e9:.0f} GFLOP/s",
    ]
    if rates.device_bytes_per_s and rates.link_bytes_per_s:
        parts.append(f"GPU memory {rates.device_bytes_per_s / 1e9:.0f} GB/s")
        parts.append(f"link {rates.link_bytes_per_s / 1e9:.1f} GB/s")
    if rates.host_shared_bytes_per_s:
        parts.append(f"CPU memory and link at once {rates.host_shared_bytes_per_s / 1e9:.1f} GB/s")
    yield f"measured: {', '.join(parts)}"
    if rates.links_bytes_per_s:
        yield f"all links at once {rates.links_bytes_per_s / 1e9:.1f} GB/s"
    if rates.disk_read_bytes_per_s and rates.disk_write_bytes_per_s:
        read, written = rates.disk_read_bytes_per_s / 1e9, rates.disk_write_bytes_per_s / 1e9
        how = machine.rates_by["disk_read_bytes_per_s"]
        yield f"disk: read {read:.2f} GB/s, written {written:.2f} GB/s ({how})"
    filled = {
        Fill.PREFILL: "by prefill",
        Fill.RANDOM: "at random, without a prefill",
        Fill.RECORDED: "at random with real models' exponents, without a prefill",
    }[spec.fill]
    yield (
        f"medians of {counted(spec.repeats, 'fresh process')} a method, "
        f"{counted(spec.new_tokens, 'decode step')} each; cache filled {filled}"
    )
    if (held := spec.settings.device_memory_bytes) is not None:
        each = " on each GPU" if spec.gpus > 1 else ""
        where = "CPU" if machine.device == "cpu" else "GPU"
        yield f"{where} memory held to {exact_bytes(held)}{each}"
    if (held := spec.settings.host_memory_bytes) is not None:
        yield f"CPU memory for KV held to {exact_bytes(held)}"


def notes(spec: BenchSpec, rows: Sequence[Row]) -> list[str]:
    """Return what must be known of rows, each text once with the contexts it is about."""
    about: dict[tuple[str, str], list[int]] = {}
    contexts: dict[str, list[int]] = {}
    for row in rows:
        name = spec.name_of(row.variant)
        contexts.setdefault(name, []).append(row.context_tokens)
        texts = row.note.split("; ") if row.note else []
        if row.format != DENSE:
            texts.append(f"KV {row.format} in CPU memory")
        if row.status is not Status.OK:
            texts.insert(0, f"{meaning(row.status)}: {row.reason}")
        elif row.limited_by:
            texts.insert(0, f"ends at {row.limited_by}")
        if row.disk_read_bytes and row.disk_bound_s:
            read, least = format_bytes(row.disk_read_bytes), format_seconds(row.disk_bound_s)
            texts.append(f"a step reads {read} from the disk, which takes {least} at least")
        busy = [part.prefill_busy for part in row.parts if part.prefill_busy is not None]
        if busy and row.prefill_s is not None:
            shares = ", ".join(f"{share:.0%}" for share in busy)
            texts.append(f"the GPUs worked {shares} of the prefill")
        if (row.others_cpu_share or 0.0) > NOISY_CPU_SHARE:
            texts.append("noisy: other programs used the CPU meanwhile")
        for text in texts:
            about.setdefault((name, text), []).append(row.context_tokens)
    return [
        f"{name}{'' if at == contexts[name] else _listed(at)}: {text}"
        for (name, text), at in about.items()
    ]


def _listed(contexts: Sequence[int]) -> str:
    return f" at {', '.join(map(format_tokens, contexts))}"


def meaning(status: Status) -> str:
    """Return a status in words."""
    return {
        Status.OK: "measured",
        Status.MISMATCH: "WRONG RESULT",
        Status.UNCHECKED: "not checked",
        Status.CANNOT_RUN: "cannot run",
        Status.FAILED: "failed",
    }[status]
