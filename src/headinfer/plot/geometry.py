"""Boxes and lines in pixels, the origin at the bottom left of the figure."""

import math
from collections.abc import Iterator
from typing import NamedTuple

Point = tuple[float, float]

_STEP_PIXELS = 10


class Box(NamedTuple):
    """An upright rectangle; matplotlib's own is too slow for the thousands that are tried."""

    left: float
    bottom: float
    right: float
    top: float

    def holds(self, point: Point) -> bool:
        """Whether a point lies inside."""
        return self.left < point[0] < self.right and self.bottom < point[1] < self.top

    def within(self, outer: "Box") -> bool:
        """Whether all of it lies inside another."""
        return (
            outer.left <= self.left
            and self.right <= outer.right
            and outer.bottom <= self.bottom
            and self.top <= outer.top
        )

    def gap(self, other: "Box") -> float:
        """Return the pixels between two boxes, 0 where they overlap."""
        return math.hypot(
            max(self.left - other.right, other.left - self.right, 0),
            max(self.bottom - other.top, other.bottom - self.top, 0),
        )


def centred(at: Point, width: float, height: float) -> Box:
    """Return a box by its centre."""
    return Box(at[0] - width / 2, at[1] - height / 2, at[0] + width / 2, at[1] + height / 2)


def between(start: Point, end: Point) -> Iterator[Point]:
    """Yield points a few pixels apart on a line, both its ends among them."""
    steps = max(math.ceil(math.dist(start, end) / _STEP_PIXELS), 1)
    for step in range(steps + 1):
        share = step / steps
        yield start[0] + share * (end[0] - start[0]), start[1] + share * (end[1] - start[1])


def along(start: Point, end: Point, distance: float, aside: float) -> Point:
    """Return the point at a distance from a line's start, and so far to the left of the line."""
    angle = math.atan2(end[1] - start[1], end[0] - start[0])
    return (
        start[0] + distance * math.cos(angle) - aside * math.sin(angle),
        start[1] + distance * math.sin(angle) + aside * math.cos(angle),
    )
