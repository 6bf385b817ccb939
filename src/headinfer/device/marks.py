"""Marks that need no event of a driver: behind nothing, or behind several others."""

from collections.abc import Sequence

from headinfer.device.base import Mark


class ReachedMark:
    """A mark behind work that was done when its call returned."""

    reached = True

    def wait(self) -> None:
        """Do nothing."""


class AllMarks:
    """A mark behind the work of several devices.

    Args:
        marks: of each.
    """

    def __init__(self, marks: Sequence[Mark]) -> None:
        self._marks = marks

    @property
    def reached(self) -> bool:
        """Whether all are."""
        return all(mark.reached for mark in self._marks)

    def wait(self) -> None:
        """Block the host until all are reached."""
        for mark in self._marks:
            mark.wait()
