"""`headinfer bench report`: result files as a document with plots."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from headinfer.bench.document import Results
from headinfer.bench.report import report as text_of
from headinfer.cli.console import reporting_errors
from headinfer.cli.report import Files, Out, Plots, write_report

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def report(files: Files, out: Out = "docs/benchmarks.md", plots: Plots = "docs/plots") -> None:
    """Write results as a document with tables and plots, the paper's tables beside them."""
    with reporting_errors():
        write_report(files, out, plots, load=Results.load, text_of=text_of, figures=_figures)


def _figures(stem: str, results: Results) -> "Iterator[tuple[str, Figure]]":
    from headinfer.bench.report_plots import figures  # needs matplotlib

    return figures(stem, results)
