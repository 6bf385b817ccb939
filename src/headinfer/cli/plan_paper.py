"""`headinfer plan --paper`: the paper's tables, each cell as paper / ours."""

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from headinfer.cli.text import print_lines, wrapping_console
from headinfer.estimate.comparison import Comparison
from headinfer.estimate.paper import comparisons


def print_paper() -> None:
    """Print all tables with why they differ."""
    console = wrapping_console()
    console.print("Each cell: paper / ours. K is 1024 tokens, GiB is 2**30 bytes.")
    for comparison in comparisons():
        console.print()
        _print(console, comparison)


def _print(console: Console, comparison: Comparison) -> None:
    console.print(f"[bold]{escape(comparison.title)}[/], {comparison.unit}")
    table = Table(box=None, pad_edge=False, padding=(0, 1), header_style="bold")
    table.add_column("", no_wrap=True)
    for name in comparison.columns:
        table.add_column(name, justify="right")
    for row in comparison.rows:
        cells = zip(row.paper, row.ours, strict=True)
        exact = comparison.unit == "GiB"
        table.add_row(row.label, *(_cell(paper, ours, exact=exact) for paper, ours in cells))
    console.print(table)
    print_lines(console, comparison.notes)


def _cell(paper: float | None, ours: float | None, *, exact: bool) -> str:
    if ours is None:
        return "-"
    if paper is None:
        return f"- / {ours:.0f}"
    if exact or ours < 9.995:
        return f"{paper:g} / {ours:.2f}"
    return f"{paper:g} / {ours:.1f}" if ours < 99.95 else f"{paper:g} / {ours:.0f}"
