"""The roofline as a plot (the paper's Figures 5 and 8)."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from headinfer.estimate.roofline import Bound, Operator, Phase, Roof, Row
from headinfer.plan.hardware import Hardware
from headinfer.plan.shape import ModelShape
from headinfer.plot.geometry import Box
from headinfer.plot.labels import Labels, LineName
from headinfer.plot.style import (
    BLACK,
    BLUE,
    GREY,
    LABEL_POINTS,
    LIGHT_BLUE,
    LIGHT_ORANGE,
    ORANGE,
    new_figure,
    si_ticks,
)
from headinfer.units import format_si, format_tokens

_SAME_PLACE = 1.1
"""Points whose intensities differ by less than this factor share a label."""

_MARKER_PIXELS = 20
_ROOF_POINTS = 2.2


@dataclass(frozen=True, slots=True, kw_only=True)
class _Group:
    """A group of points of one phase in one place that coincide on the plot."""

    phase: Phase
    offloaded: bool
    contexts: tuple[int, ...]
    roof: Roof

    @property
    def at(self) -> tuple[float, float]:
        return self.roof.intensity_flops_per_byte, self.roof.attainable_flops_per_s

    @property
    def color(self) -> str:
        return ORANGE if self.offloaded else BLUE

    @property
    def text(self) -> str:
        names = [format_tokens(tokens) for tokens in self.contexts]
        shown = ", ".join(names) if len(names) <= 3 else f"{names[0]} to {names[-1]}"
        text = f"{self.phase.value} {shown}"
        if self.roof.bound is Bound.COMPUTE:
            return text
        return f"{text}\n{format_si(self.roof.attainable_flops_per_s, 'FLOP/s')}"


def draw(shape: ModelShape, hardware: Hardware, rows: Sequence[Row]) -> Figure:
    """Return the plot of rows that `roofline_rows` counted on a machine.

    Blue is what runs on keys and values in device memory, orange on offloaded ones. The rings are
    all heads at once and the dots in them one KV head. Where each dot sits in its ring, going head
    by head loses nothing.
    """
    figure, axes = new_figure(
        f"Attention of {shape.name} on {hardware.description}",
        "attainable rate = the lowest roof over operations per byte moved; K tokens is 1024",
    )
    axes.set_xlabel("operational intensity (FLOP/byte)", fontsize=LABEL_POINTS + 1)
    axes.set_ylabel("attainable rate (FLOP/s)", fontsize=LABEL_POINTS + 1)
    groups = list(_groups(rows))
    _set_limits(axes, hardware, [group.roof for group in groups])
    si_ticks(axes)
    labels = Labels(axes)
    labels.avoid_box(_draw_legend(axes, has_link=hardware.link_bytes_per_s is not None))
    for row in rows:
        _draw_points(axes, row)
    for group in groups:
        labels.avoid_point(group.at, _MARKER_PIXELS / 2)
    names = list(_draw_roofs(axes, labels, hardware))
    for group in groups:
        labels.name_point(group.at, group.text, group.color, below=group.offloaded)
    for name in names:
        labels.name_line(name)
    return figure


def _groups(rows: Sequence[Row]) -> Iterator[_Group]:
    for phase in Phase:
        of_phase = [row for row in rows if row.phase is phase]
        for offloaded in (False, True):
            points = [
                (row.context_tokens, roof)
                for row in of_phase
                if (roof := row.offloaded if offloaded else row.device) is not None
            ]
            points.sort(key=lambda point: point[1].intensity_flops_per_byte)
            while points:
                roof = points[0][1]
                limit = _SAME_PLACE * roof.intensity_flops_per_byte
                near = [point for point in points if point[1].intensity_flops_per_byte < limit]
                points = points[len(near) :]
                contexts = tuple(sorted({tokens for tokens, _ in near}))
                yield _Group(phase=phase, offloaded=offloaded, contexts=contexts, roof=roof)


def _set_limits(axes: Axes, hardware: Hardware, roofs: Sequence[Roof]) -> None:
    intensities = [roof.intensity_flops_per_byte for roof in roofs]
    rates = [roof.attainable_flops_per_s for roof in roofs]
    axes.set_xlim(min(intensities) / 6, max(intensities) * 5)
    axes.set_ylim(min(rates) / 6, hardware.matmul_flops_per_s * 6)


def _draw_roofs(axes: Axes, labels: Labels, hardware: Hardware) -> Iterator[LineName]:
    """Draw the diagonals of memory and link, and the ceiling they end at; yield their names."""
    left, right = axes.get_xlim()
    bottom, ceiling = axes.get_ylim()[0], hardware.matmul_flops_per_s
    memory, link = hardware.device_bytes_per_s, hardware.link_bytes_per_s
    first_ridge = ceiling / memory
    axes.plot([left, first_ridge], [ceiling] * 2, color=GREY, linewidth=1, linestyle="--")
    axes.plot([first_ridge, right], [ceiling] * 2, color=BLACK, linewidth=_ROOF_POINTS)
    labels.avoid_line((left, ceiling), (right, ceiling))
    yield LineName(
        start=(left, ceiling),
        end=(first_ridge, ceiling),
        text=_name("compute", ceiling, "FLOP/s"),
        color=BLACK,
    )
    diagonals = [("device memory" if link else "memory", memory, BLUE, LIGHT_BLUE)]
    if link is not None:
        diagonals.append(("link", link, ORANGE, LIGHT_ORANGE))
    for name, rate, color, light in diagonals:
        x = max(left, bottom / rate)
        start, ridge, foot = (x, x * rate), (ceiling / rate, ceiling), (ceiling / rate, bottom)
        xs, ys = zip(start, ridge, (right, ceiling), strict=True)
        axes.fill_between(xs, ys, bottom, color=light, linewidth=0, zorder=0)
        axes.plot(xs[:2], ys[:2], color=color, linewidth=_ROOF_POINTS)
        axes.plot([foot[0]] * 2, [bottom, ceiling], color=color, linewidth=1, linestyle=":")
        labels.avoid_line(start, ridge)
        labels.avoid_line(foot, ridge)
        yield LineName(start=start, end=ridge, text=_name(name, rate, "B/s"), color=color)
        note = f"compute-bound from {ridge[0]:,.0f} FLOP/byte"
        yield LineName(start=foot, end=ridge, text=note, color=color, is_note=True)


def _name(what: str, rate: float, unit: str) -> str:
    return f"{what}: {format_si(rate, unit)}"


def _draw_points(axes: Axes, row: Row) -> None:
    for roof, offloaded in ((row.offloaded, True), (row.device, False)):
        if roof is not None:
            axes.plot(
                roof.intensity_flops_per_byte,
                roof.attainable_flops_per_s,
                **_marker(row.operator, offloaded=offloaded),
            )


def _marker(operator: Operator, *, offloaded: bool, color: str | None = None) -> dict[str, Any]:
    """Return a ring for all heads, a dot for one; diamonds are wider, to show where both meet."""
    color = color or (ORANGE if offloaded else BLUE)
    marker = {"marker": "D" if offloaded else "o", "color": color, "linestyle": ""}
    if operator is Operator.HEAD_WISE:
        return marker | {"markersize": 4.5, "zorder": 6}
    size = 13 if offloaded else 12
    return marker | {
        "markersize": size,
        "markerfacecolor": "white",
        "markeredgewidth": 2.2,
        "zorder": 4,
    }


def _draw_legend(axes: Axes, *, has_link: bool) -> Box:
    """Draw it in the corner that lies under every roof, and return the pixels it takes."""
    handles = [
        Line2D([], [], label=label, **_marker(operator, offloaded=False, color=GREY))
        for operator, label in (
            (Operator.FLASH_ATTENTION, "all heads at once (flash attention)"),
            (Operator.HEAD_WISE, "one KV head at a time (head-wise)"),
        )
    ]
    if has_link:
        handles += [
            Line2D([], [], label=label, **_marker(Operator.FLASH_ATTENTION, offloaded=offloaded))
            for offloaded, label in (
                (False, "keys and values on the device"),
                (True, "keys and values over the link"),
            )
        ]
    legend = axes.legend(handles=handles, loc="lower right", fontsize=LABEL_POINTS, framealpha=1)
    return Box(*legend.get_window_extent().extents)
