"""How all plots look: size, colours, axes; and writing them to files."""

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from headinfer.units import format_si

BLACK, GREY = "#000000", "#555555"
BLUE, ORANGE = "#0072b2", "#d55e00"
"""Colours of Okabe and Ito's palette, which colour-blind readers tell apart."""

LIGHT_BLUE, LIGHT_ORANGE = "#eef5fa", "#fdf2ea"
"""The same for areas."""

TITLE_POINTS, TEXT_POINTS, LABEL_POINTS = 19, 14, 13
"""Sizes of type at 1600 x 1000 pixels."""

_SIZE_INCHES, _PIXELS_PER_INCH = (16, 10), 100


def new_figure(title: str, subtitle: str) -> tuple[Figure, Axes]:
    """Return an empty figure of 1600 x 1000 pixels with log-log axes, and no pyplot state."""
    figure = Figure(figsize=_SIZE_INCHES, dpi=_PIXELS_PER_INCH, facecolor="white")
    FigureCanvasAgg(figure)  # text can be measured before the figure is saved
    axes = figure.add_axes((0.075, 0.085, 0.895, 0.805))
    figure.text(0.075, 0.95, title, fontsize=TITLE_POINTS, fontweight="bold", va="center")
    figure.text(0.075, 0.913, subtitle, fontsize=TEXT_POINTS, color=GREY, va="center")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(numticks=20))
    axes.set_xscale("log")
    axes.set_yscale("log")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_minor_formatter(NullFormatter())
    axes.tick_params(labelsize=LABEL_POINTS)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(which="major", color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    return figure, axes


def si_ticks(axes: Axes) -> None:
    """Write ticks with prefixes of 1000: 100G, not 10 to the 11th."""
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _place: _tick(value)))


def save(figure: Figure, path: str) -> None:
    """Write a figure in the format that the file's suffix names."""
    figure.savefig(path)


def _tick(value: float) -> str:
    text = format_si(value)
    digits = text.rstrip("KMGTPE")
    return f"{float(digits):g}{text[len(digits) :]}"
