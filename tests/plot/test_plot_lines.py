"""Plots of lines over contexts: what is drawn, and names that can be read."""

import itertools

import pytest

pytest.importorskip("matplotlib")

from matplotlib.text import Text

from headinfer.plot.lines import BOUND, Line, Look, draw
from headinfer.plot.style import save
from headinfer.units import format_bytes, format_seconds

CONTEXTS = (1024, 4096, 16384, 131072)


def line(name: str, factor: float, contexts=CONTEXTS, **more) -> Line:
    points = tuple((tokens, factor * tokens) for tokens in contexts)
    return Line(name=name, points=points, look=Look(color="#0072b2"), **more)


def plot(lines, format_value=format_seconds, **more):
    figure = draw("title", "subtitle", "quantity", lines, format_value, **more)
    figure.canvas.draw()
    return figure.axes[0]


def names_of(axes) -> list[Text]:
    return [text for text in axes.texts if text.get_text()]


@pytest.mark.parametrize("spread", [1.0, 1.01, 3.0])
def test_names_stand_apart_beside_the_axes_and_inside_the_figure(spread):
    lines = [line(f"a-method-of-name-{n}", 1e-6 * spread**n) for n in range(14)]
    axes = plot(lines)
    boxes = [Text.get_window_extent(text) for text in names_of(axes)]
    assert len(boxes) == 14
    assert not any(one.overlaps(other) for one, other in itertools.combinations(boxes, 2))
    figure = axes.figure.bbox
    for box in boxes:
        assert axes.get_window_extent().x1 < box.x0 < box.x1 <= figure.x1
        assert figure.y0 <= box.y0 < box.y1 <= figure.y1


def test_bounds_are_dashed_and_a_line_that_breaks_off_ends_in_a_cross():
    bound = Line(name="least possible", points=((1024, 1e-4), (131072, 1e-2)), look=BOUND)
    short = line("standard", 1e-5, CONTEXTS[:2], broken_off=True)
    axes = plot([short, line("headinfer", 1e-6), bound])
    drawn = axes.get_lines()
    assert [part.get_linestyle() for part in drawn if len(part.get_xdata()) > 1] == ["-", "-", "--"]
    (cross,) = [part for part in drawn if part.get_marker() == "x"]
    assert cross.get_xdata() == pytest.approx([4096])


def test_ticks_are_the_contexts_and_values_as_people_write_them():
    axes = plot([line("headinfer", 1e-5)])
    assert [text.get_text() for text in axes.get_xticklabels()] == ["1K", "4K", "16K", "128K"]
    assert "100 ms" in [text.get_text() for text in axes.get_yticklabels()]
    axes = plot([line("headinfer", 2048)], format_bytes, base=2)
    assert "16 MiB" in [text.get_text() for text in axes.get_yticklabels()]


def test_a_single_point_is_a_plot_of_moderate_size(tmp_path):
    figure = draw("t", "s", "q", [line("headinfer", 1e-6, (1024,))], format_seconds)
    save(figure, str(tmp_path / "plot.png"))
    assert 0 < (tmp_path / "plot.png").stat().st_size < 200_000
