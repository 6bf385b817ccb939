"""A disk below host memory, as a user asks about it."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Disk:
    """A disk that has room for tokens.

    Attributes:
        folder: that the user named.
        said: its file system, for people.
        free_bytes: what files there can still take.
    """

    folder: str
    said: str
    free_bytes: int
