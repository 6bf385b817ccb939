"""Lines over contexts, log-log: one a method, bounds dashed, names beside their ends."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

from headinfer.plot.style import GREY, LABEL_POINTS, new_figure
from headinfer.units import format_tokens

_POSITION = (0.075, 0.085, 0.72, 0.79)
"""Position of the axes in the figure: names stand to the right of them."""

_NAME_GAP_PIXELS, _NAME_HEIGHT_PIXELS = 26, 25


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """A look: how a line is drawn.

    Attributes:
        color: of line, markers and name.
        marker: matplotlib's code of the markers; empty for none.
        width_points: of the line.
        dashed: whether it is.
    """

    color: str
    marker: str = "o"
    width_points: float = 2.0
    dashed: bool = False


BOUND = Look(color=GREY, marker="", width_points=1.6, dashed=True)
"""Look of what physics allows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """A line.

    Attributes:
        name: written beside its end.
        points: tokens and values, ascending; at least one.
        look: how it is drawn.
        broken_off: whether longer contexts were tried and did not run; a cross marks the end.
    """

    name: str
    points: tuple[tuple[int, float], ...]
    look: Look
    broken_off: bool = False


def draw(
    title: str,
    subtitle: str,
    quantity: str,
    lines: Sequence[Line],
    format_value: Callable[[float], str],
    *,
    base: int = 10,
) -> Figure:
    """Return the plot.

    Args:
        title: of the figure.
        subtitle: the conditions.
        quantity: what is on the vertical axis.
        lines: in the order they are drawn, the last on top; bounds among them.
        format_value: writes a value at a tick.
        base: 10 for ticks at powers of ten, 2 for powers of two.
    """
    figure, axes = new_figure(title, subtitle)
    axes.set_position(_POSITION)
    axes.set_xlabel("context (tokens)", fontsize=LABEL_POINTS + 1)
    axes.set_ylabel(quantity, fontsize=LABEL_POINTS + 1)
    for line in lines:
        _draw_line(axes, line)
    contexts = sorted({tokens for line in lines for tokens, _ in line.points})
    axes.xaxis.set_major_locator(FixedLocator(contexts))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda tokens, _: format_tokens(int(tokens))))
    bottom, top = axes.get_ylim()
    subs = (1.0,) if base == 2 or top / bottom > 300 else (1.0, 2.0, 5.0)
    axes.yaxis.set_major_locator(LogLocator(base=base, subs=subs, numticks=14))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(
        FuncFormatter(lambda value, _: format_value(value).replace(".00 ", " "))
    )
    axes.set_xlim(contexts[0] / 1.15, contexts[-1] * 1.15)
    axes.set_ylim(bottom, top)
    _write_names(axes, lines)
    return figure


def _draw_line(axes: Axes, line: Line) -> None:
    look = line.look
    tokens, values = zip(*line.points, strict=True)
    axes.plot(
        tokens,
        values,
        color=look.color,
        linewidth=look.width_points,
        linestyle="--" if look.dashed else "-",
        marker=look.marker or None,
        markersize=7,
    )
    if line.broken_off:
        axes.plot(tokens[-1], values[-1], marker="x", markersize=15, markeredgewidth=2.5, color="k")


def _write_names(axes: Axes, lines: Sequence[Line]) -> None:
    """Write names in a column at the right, as near to the ends of their lines as they go."""
    to_pixels = axes.transData.transform
    ends = sorted(((to_pixels(line.points[-1]), line) for line in lines), key=lambda end: end[0][1])
    inside = axes.get_window_extent()
    heights: list[float] = []
    for (_, height), _line in ends:
        heights.append(max([height, *(heights[-1:] and [heights[-1] + _NAME_HEIGHT_PIXELS])]))
    excess = max(heights[-1] - inside.y1, 0)
    for place in reversed(range(len(heights))):  # push down again what was pushed out at the top
        limit = heights[place + 1] - _NAME_HEIGHT_PIXELS if place + 1 < len(heights) else inside.y1
        heights[place] = min(heights[place], limit) if excess else heights[place]
    left = inside.x1 + _NAME_GAP_PIXELS
    for ((x, y), line), height in zip(ends, heights, strict=True):
        axes.annotate(
            line.name,
            (float(x), float(y)),
            xycoords="figure pixels",
            xytext=(left, height),
            textcoords="figure pixels",
            color=line.look.color,
            fontsize=LABEL_POINTS,
            fontweight="normal" if line.look.dashed else "bold",
            va="center",
            annotation_clip=False,
            arrowprops={
                "arrowstyle": "-",
                "linewidth": 0.7,
                "linestyle": ":",
                "color": line.look.color,
                "relpos": (0, 0.5),
                "shrinkA": 0,
                "shrinkB": 6,
            },
        )
