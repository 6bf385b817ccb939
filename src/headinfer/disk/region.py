"""Regions of the file below host memory that hold tokens."""

from dataclasses import dataclass

from headinfer.disk.file import SpillFile


@dataclass(frozen=True, slots=True)
class Region:
    """A region of the file, written once, and never changed.

    Attributes:
        file: the file.
        offset: of its first byte there.
        num_bytes: how many there are.
    """

    file: SpillFile
    offset: int
    num_bytes: int

    def free(self) -> None:
        """Give it back, with nothing under way in it."""
        self.file.free(self.offset, self.num_bytes)
