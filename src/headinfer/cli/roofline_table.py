"""The roofline as tables for people, 80 columns wide."""

from collections.abc import Iterable, Iterator, Sequence

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from headinfer.estimate.roofline import (
    Operator,
    Phase,
    Roof,
    Row,
    attended_layer,
    link_hidden_from_tokens,
)
from headinfer.estimate.roofline_paper import Cell, Column, Reason
from headinfer.plan.hardware import Hardware
from headinfer.plan.shape import ModelShape
from headinfer.units import counted, format_si, format_tokens

_SHORT = {Operator.FLASH_ATTENTION: "flash", Operator.HEAD_WISE: "head-wise"}
_FIGURES = ("bytes", "FLOP/B", "FLOP/s", "bound")
_REGULAR = ("ops", *(f"device\n{name}" for name in _FIGURES))
_OFFLOADED = tuple(f"link\n{name}" for name in _FIGURES)


def render(
    shape: ModelShape, hardware: Hardware, rows: Sequence[Row], *, causal: bool
) -> RenderableType:
    """Return a table for each phase, with the ceilings above them and how to read them below."""
    parts: list[RenderableType] = [*_conditions(shape, hardware)]
    for phase in Phase:
        parts.append(Text(f"\n{phase.value}", style="bold"))
        parts.append(_phase_table([row for row in rows if row.phase is phase]))
    parts.append(Text())
    parts.extend(Text(line) for line in _findings(shape, hardware))
    parts.extend(Text(line, style="dim") for line in _legend(rows, causal=causal))
    return Group(*parts)


def render_paper(compared: Iterable[tuple[Row, tuple[Cell, ...]]]) -> RenderableType:
    """Return the paper's Table 12 as paper / ours, with a letter wherever they differ."""
    rows = list(compared)
    letters = dict(zip(Reason, "abcd", strict=True))
    parts: list[RenderableType] = []
    for offloaded, title in ((False, "regular"), (True, "offloaded")):
        parts.append(Text(f"Table 12, {title}: paper / ours", style="bold"))
        table = _table((*(_OFFLOADED if offloaded else _REGULAR), "why"))
        previous = rows[0][0]
        for row, cells in rows:
            if (row.phase, row.operator) != (previous.phase, previous.operator):
                table.add_section()
                previous = row
            side = [cell for cell in cells if cell.offloaded is offloaded]
            why = sorted({letters[cell.reason] for cell in side if cell.reason})
            table.add_row(*_names(row), *map(_twice, side), " ".join(why))
        parts.extend([table, Text()])
    reasons = Table.grid(padding=(0, 2, 0, 0))
    for reason, letter in letters.items():
        reasons.add_row(letter, reason.value)
    return Group(*parts, reasons)


def format_rates(hardware: Hardware) -> str:
    """Return the ceilings in one line."""
    rates = [
        f"compute {format_si(hardware.matmul_flops_per_s, 'FLOP/s')}",
        f"device memory {format_si(hardware.device_bytes_per_s, 'B/s')}",
    ]
    if hardware.link_bytes_per_s is not None:
        rates.append(f"link {format_si(hardware.link_bytes_per_s, 'B/s')}")
    return ", ".join(rates)


def _conditions(shape: ModelShape, hardware: Hardware) -> Iterator[Text]:
    layer = attended_layer(shape)
    yield Text(f"{shape.name} on {hardware.description}", style="bold")
    dims = f"{layer.key_dim}"
    if layer.value_dim != layer.key_dim:
        dims = f"{layer.key_dim} (keys) and {layer.value_dim} (values)"
    yield Text(
        f"one layer: {counted(shape.query_heads, 'query head')} on "
        f"{counted(layer.kv_heads, 'KV head')} of {dims}, "
        f"{counted(shape.kv_itemsize, 'byte')} an element"
    )
    source = "measured" if hardware.measured else "data sheet"
    yield Text(f"ceilings ({source}): {format_rates(hardware)}")


def _phase_table(rows: Sequence[Row]) -> Table:
    has_link = rows[0].offloaded is not None
    table = _table((*_REGULAR, *_OFFLOADED) if has_link else _REGULAR)
    previous = rows[0].operator
    for row in rows:
        if row.operator is not previous:
            table.add_section()
            previous = row.operator
        cells = [format_si(row.operations), *_cells(row.device)]
        if row.offloaded is not None:
            cells.extend(_cells(row.offloaded))
        table.add_row(*_names(row), *cells)
    return table


def _table(columns: Sequence[str]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=0, show_edge=False)
    table.add_column("operator", no_wrap=True)
    for name in ("tokens", *columns):
        words = name.endswith(("bound", "why"))
        table.add_column(name, justify="left" if words else "right", no_wrap=True)
    return table


def _names(row: Row) -> tuple[str, str]:
    return _SHORT[row.operator], format_tokens(row.context_tokens)


def _cells(roof: Roof) -> Iterator[str]:
    yield format_si(roof.bytes)
    yield _intensity(roof.intensity_flops_per_byte)
    yield format_si(roof.attainable_flops_per_s)
    yield roof.bound.value


def _intensity(value: float) -> str:
    """Return an intensity in plain digits while they are few: its K would not be that of tokens."""
    return f"{value:.0f}" if 999.5 <= value < 999_999.5 else format_si(value)


def _twice(cell: Cell) -> Text:
    """Return paper / ours, coloured if they differ; a bound that is the same once."""
    ours = cell.ours
    if not isinstance(ours, str):
        ours = _intensity(ours) if cell.column is Column.INTENSITY else format_si(ours)
    if cell.column is Column.BOUND and cell.reason is None:
        return Text(cell.paper)
    return Text(f"{cell.paper} / {ours}", style="yellow" if cell.reason else "")


def _findings(shape: ModelShape, hardware: Hardware) -> Iterator[str]:
    tokens = link_hidden_from_tokens(shape, hardware)
    if tokens is None or hardware.link_bytes_per_s is None:
        yield "There is no link: the CPU attends where the cache lies, and nothing is copied."
        return
    ratio = hardware.device_bytes_per_s / hardware.link_bytes_per_s
    yield f"Prefill in chunks of {counted(tokens, 'token')} or more hides the link behind compute."
    yield f"Decode reads keys and values {ratio:.0f} times slower over the link than in GPU memory."


def _legend(rows: Sequence[Row], *, causal: bool) -> Iterator[str]:
    group = rows[0].query_heads // rows[0].kv_heads
    whose = f"its {group} query heads" if group > 1 else "its query head"
    yield f"flash: all heads of a layer at once; head-wise: one KV head and {whose}."
    if rows[0].offloaded is not None:
        yield "device: keys and values lie in GPU memory; link: they are offloaded."
    yield "Keys and values count once for each KV head, not once for each query head."
    if causal:
        yield "Prefill counts the pairs that a causal mask leaves (the paper: the full square)."
    else:
        yield "Prefill counts the full square, as the paper does; --causal counts half of it."
    yield "tokens: K is 1024; all else: K, M, G, T, P are powers of 1000."
