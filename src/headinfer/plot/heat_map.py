"""Heat maps side by side: one a method, with a value in every cell."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from headinfer.plot.style import BLUE, GREY, LABEL_POINTS, ORANGE, TEXT_POINTS, TITLE_POINTS

_COLOURS = LinearSegmentedColormap.from_list("found", [ORANGE, "#f7f7f7", BLUE])
"""From nothing over half to all, which colour-blind readers tell apart."""

_COLUMN_INCHES, _LEAST_INCHES, _GAP_INCHES = 1.1, 3.4, 0.35
_LEAST_WIDTH_INCHES = 10.0
"""Width that the lines above the panels take."""

_MARGIN_INCHES, _LETTER_INCHES = 0.9, 0.1
_CELL_INCHES, _HEAD_INCHES, _FOOT_INCHES = 0.42, 1.5, 0.9


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """A heat map of one method.

    Attributes:
        name: of the method.
        values: from 0 to 1, by row and column; cells that are missing stay white.
        marked: cells with a black bar at their left.
    """

    name: str
    values: Mapping[tuple[str, str], float]
    marked: frozenset[tuple[str, str]] = frozenset()


def draw(
    title: str,
    subtitle: str,
    panels: Sequence[Panel],
    *,
    rows: Sequence[str],
    columns: Sequence[str],
    axes: tuple[str, str],
) -> Figure:
    """Return the plot.

    Args:
        title: of the figure.
        subtitle: the conditions.
        panels: from left to right.
        rows: names, from the top.
        columns: names, from the left.
        axes: what rows and columns are.
    """
    margin = _MARGIN_INCHES + _LETTER_INCHES * max(map(len, rows))
    panel_inches = max(_LEAST_INCHES, _COLUMN_INCHES * len(columns))
    width = max(margin + panel_inches * len(panels), _LEAST_WIDTH_INCHES)
    height = _HEAD_INCHES + _FOOT_INCHES + _CELL_INCHES * max(len(rows), 5)
    figure = Figure(figsize=(width, height), dpi=100, facecolor="white")
    FigureCanvasAgg(figure)
    left = 0.5 * _MARGIN_INCHES / width
    figure.text(
        left, 1 - 0.35 / height, title, fontsize=TITLE_POINTS, fontweight="bold", va="center"
    )
    figure.text(left, 1 - 0.75 / height, subtitle, fontsize=TEXT_POINTS, color=GREY, va="center")
    for number, panel in enumerate(panels):
        place = figure.add_axes(
            (
                (margin + number * panel_inches) / width,
                _FOOT_INCHES / height,
                (panel_inches - _GAP_INCHES) / width,
                1 - (_HEAD_INCHES + _FOOT_INCHES) / height,
            )
        )
        _draw_panel(place, panel, rows, columns)
        place.set_xlabel(axes[1], fontsize=LABEL_POINTS)
        if number == 0:
            place.set_ylabel(axes[0], fontsize=LABEL_POINTS)
            place.set_yticks(range(len(rows)), labels=list(rows))
        else:
            place.set_yticks([])
    return figure


def _draw_panel(place: Axes, panel: Panel, rows: Sequence[str], columns: Sequence[str]) -> None:
    grid = [[panel.values.get((row, column), float("nan")) for column in columns] for row in rows]
    place.imshow(grid, cmap=_COLOURS, vmin=0, vmax=1, aspect="auto")
    place.set_title(panel.name, fontsize=TEXT_POINTS, loc="left")
    place.set_xticks(range(len(columns)), labels=list(columns))
    place.tick_params(labelsize=LABEL_POINTS - 1, length=0)
    place.spines[:].set_visible(False)
    place.set_xticks([at - 0.5 for at in range(1, len(columns))], minor=True)
    place.set_yticks([at - 0.5 for at in range(1, len(rows))], minor=True)
    place.grid(which="minor", color="white", linewidth=2)
    place.tick_params(which="minor", length=0)
    for y, row in enumerate(rows):
        for x, column in enumerate(columns):
            value = panel.values.get((row, column))
            if value is None:
                continue
            light = abs(value - 0.5) < 0.3
            place.text(
                *(x, y, f"{100 * value:.0f}"),
                ha="center",
                va="center",
                fontsize=LABEL_POINTS - 2,
                color="black" if light else "white",
            )
            if (row, column) in panel.marked:
                corner = Rectangle((x - 0.5, y - 0.5), 0.16, 1, facecolor="black")
                place.add_patch(corner)
