"""Sentences and tables, in a terminal and elsewhere."""

import os
import re
import sys
from collections.abc import Iterable
from typing import TextIO, cast

from rich.console import Console
from rich.markup import escape
from rich.table import Table

WIDTH = 100
"""Columns where neither a terminal nor `COLUMNS` tells; all of the table of plans fits in them."""

_PADDING = re.compile(r"[ \t]+(?=\n)")


class _Unpadded:
    """A stream whose lines lose the spaces at their ends, which pad columns for terminals alone."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    @property
    def encoding(self) -> str:
        """The stream's, by which lines of tables are chosen."""
        return self._stream.encoding

    def write(self, text: str) -> int:
        """Write whole lines."""
        return self._stream.write(_PADDING.sub("", text))

    def isatty(self) -> bool:
        """Return whether it is a terminal, which it never is."""
        return False

    def flush(self) -> None:
        """Flush the stream."""
        self._stream.flush()


def wrapping_console(*, stderr: bool = False, highlight: bool = False) -> Console:
    """Return a console that breaks lines.

    Where it is no terminal it is as wide as `COLUMNS` says, and lines end where their text does.

    Args:
        stderr: for all that is no result.
        highlight: whether numbers stand out in a terminal.
    """
    console = Console(stderr=stderr, highlight=highlight)
    if console.is_terminal:
        return console
    columns = os.environ.get("COLUMNS", "")
    width = int(columns) if columns.isdecimal() and int(columns) else WIDTH
    plain = cast(TextIO, _Unpadded(sys.stderr if stderr else sys.stdout))
    return Console(file=plain, width=width, highlight=highlight)


def print_lines(console: Console, lines: Iterable[str]) -> None:
    """Print sentences one below the other, each marked, and indented where it is broken."""
    grid = Table.grid(padding=(0, 1))
    for line in lines:
        grid.add_row("[dim]-[/]", escape(line))
    console.print(grid)
