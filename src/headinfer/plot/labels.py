"""Labels that overlap neither each other nor the points they name."""

import math
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.patheffects import withStroke
from matplotlib.text import Text

from headinfer.plot.geometry import Box, Point, along, between, centred
from headinfer.plot.style import LABEL_POINTS

_DISTANCES_PIXELS = (16, 32, 52, 78, 110, 150)
_DIRECTIONS = tuple(math.radians(angle) for angle in (90, 270, *range(0, 360, 15)))
_LINE_PLACES = 30
_MARGIN_PIXELS = 5
_LINE_END_PIXELS = 30

_JOINT = {"arrowstyle": "-", "linewidth": 0.8, "shrinkA": 0, "shrinkB": 9}

_OVERLAP_COST, _CROSSING_COST, _OTHER_SIDE_COST = 10_000, 30, 40
"""Against a pixel of distance: overlaps are the last resort, a line through a label the next."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LineName:
    """A name that is to be written along a line.

    Attributes:
        start: the left or lower end of the line, in data coordinates.
        end: the other one.
        text: the name.
        color: of the text.
        is_note: whether it stands below the line, or right of an upright one, and is not bold.
    """

    start: Point
    end: Point
    text: str
    color: str
    is_note: bool = False


class Labels:
    """A set of labels, placed one after another, each where it covers the least.

    Args:
        axes: with their final limits.
    """

    def __init__(self, axes: Axes) -> None:
        self._axes = axes
        self._inside = Box(*axes.get_window_extent().extents)
        self._taken: list[Box] = []
        self._crossings: list[Point] = []

    def avoid_box(self, box: Box) -> None:
        """Keep labels off a rectangle of pixels."""
        self._taken.append(box)

    def avoid_point(self, at: Point, radius_pixels: float) -> None:
        """Keep labels off a marker at data coordinates."""
        self._taken.append(centred(self._pixels(at), 2 * radius_pixels, 2 * radius_pixels))

    def avoid_line(self, start: Point, end: Point) -> None:
        """Keep labels off a line between two points in data coordinates, if there is room."""
        self._crossings.extend(between(self._pixels(start), self._pixels(end)))

    def name_point(self, at: Point, text: str, color: str, *, below: bool) -> Text:
        """Write a name above or below a marker; elsewhere, joined by a line, if there is no room.

        Args:
            at: the marker, in data coordinates.
            text: the name, of any number of lines.
            color: of text and line.
            below: which side to try first.
        """
        (width, height), marker = self._measure(text), self._pixels(at)
        best: tuple[float, Point, list[Point]] = (math.inf, marker, [])
        for distance in _DISTANCES_PIXELS:
            if best[0] <= distance:
                break  # no place this far off can be better
            for direction in _DIRECTIONS:
                dx = math.cos(direction) * (distance + width / 2)
                dy = math.sin(direction) * (distance + height / 2)
                middle = (marker[0] + dx, marker[1] + dy)
                joint = [] if distance == _DISTANCES_PIXELS[0] else list(between(marker, middle))
                cost = self._cost(centred(middle, width, height), joint)
                cost += distance + _OTHER_SIDE_COST * ((dy < 0) != below)
                best = min(best, (cost, middle, joint), key=lambda place: place[0])
        _, middle, joint = best
        self._taken.append(centred(middle, width, height))
        self._taken.extend(centred(point, 2, 2) for point in joint)
        points_per_pixel = 72 / self._axes.figure.dpi
        return self._axes.annotate(
            text,
            at,
            xytext=(
                (middle[0] - marker[0]) * points_per_pixel,
                (middle[1] - marker[1]) * points_per_pixel,
            ),
            textcoords="offset points",
            arrowprops=_JOINT | {"color": color} if joint else None,
            color=color,
            fontsize=LABEL_POINTS,
            ha="center",
            va="center",
            path_effects=[withStroke(linewidth=4, foreground="white")],
        )

    def name_line(self, name: LineName) -> Text:
        """Write a name along a line, where most is free around it."""
        weight = "normal" if name.is_note else "bold"
        width, height = self._measure(name.text, weight)
        start, end = self._pixels(name.start), self._pixels(name.end)
        aside = (height / 2 + _MARGIN_PIXELS) * (-1 if name.is_note else 1)
        first = width / 2 + _LINE_END_PIXELS
        room = max(math.dist(start, end) - 2 * first, 0)

        def squares(middle: float) -> list[Box]:
            """Return squares that cover the slanting text at a distance from the line's start."""
            ends = (middle - width / 2, middle + width / 2)
            points = between(*(along(start, end, distance, aside) for distance in ends))
            return [centred(point, height, height) for point in points]

        places = [first + room * place / _LINE_PLACES for place in range(_LINE_PLACES + 1)]
        middle = max(places, key=lambda place: self._clearance(squares(place)))
        self._taken.extend(squares(middle))
        x, y = self._axes.transData.inverted().transform(along(start, end, middle, aside))
        return self._axes.text(
            x,
            y,
            name.text,
            color=name.color,
            fontsize=LABEL_POINTS,
            fontweight=weight,
            ha="center",
            va="center",
            rotation=math.degrees(math.atan2(end[1] - start[1], end[0] - start[0])),
            rotation_mode="anchor",
        )

    def _pixels(self, at: Point) -> Point:
        x, y = self._axes.transData.transform(at)
        return float(x), float(y)

    def _measure(self, text: str, weight: str = "normal") -> tuple[float, float]:
        """Return width and height of a level text in pixels."""
        sample = self._axes.text(0.5, 0.5, text, fontsize=LABEL_POINTS, fontweight=weight)
        extent = sample.get_window_extent()
        sample.remove()
        return extent.width, extent.height

    def _cost(self, box: Box, joint: list[Point]) -> float:
        """Return the cost of a label in a box, and of the line that joins it to its marker."""
        padded = Box(
            box.left - _MARGIN_PIXELS,
            box.bottom - _MARGIN_PIXELS,
            box.right + _MARGIN_PIXELS,
            box.top + _MARGIN_PIXELS,
        )
        overlaps = sum(not padded.gap(other) for other in self._taken)
        overlaps += not padded.within(self._inside)
        if overlaps:
            return _OVERLAP_COST * overlaps
        crossings = sum(map(padded.holds, self._crossings))
        crossings += 3 * sum(other.holds(point) for other in self._taken for point in joint[2:])
        return _CROSSING_COST * crossings

    def _clearance(self, boxes: list[Box]) -> float:
        """Return pixels to the nearest thing placed, less the cost of what the boxes cover."""
        covered = sum(not box.within(self._inside) for box in boxes)
        covered += sum(box.holds(point) for box in boxes for point in self._crossings)
        nearest = min((box.gap(other) for box in boxes for other in self._taken), default=0.0)
        return nearest - _OVERLAP_COST * covered
