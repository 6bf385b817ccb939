"""Sentences in a terminal."""

from collections.abc import Iterable

from rich.console import Console
from rich.markup import escape
from rich.table import Table


def print_lines(console: Console, lines: Iterable[str]) -> None:
    """Print sentences one below the other, each marked, and indented where it is broken."""
    grid = Table.grid(padding=(0, 1))
    for line in lines:
        grid.add_row("[dim]-[/]", escape(line))
    console.print(grid)
