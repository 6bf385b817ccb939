"""`headinfer evaluate report`: result files as a document with plots."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from headinfer.cli.console import reporting_errors
from headinfer.cli.report import Files, Out, Plots, write_report
from headinfer.evaluate.answers.document import Answers

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from headinfer.evaluate.report.document import Results


def report(files: Files, out: Out = "docs/evaluation.md", plots: Plots = "docs/plots") -> None:
    """Write results as a document with tables and plots, the paper's figures beside them."""
    # Imported here and not above: it imports torch, which the verbs' help does without.
    from headinfer.evaluate.report.document import report as text_of

    with reporting_errors():
        write_report(files, out, plots, load=_load, text_of=text_of, figures=_figures)


def _load(path: str) -> "Results":
    """Return the results of either kind.

    Raises:
        OptionError: the file holds neither.
    """
    from headinfer.evaluate.agreement.document import AgreementResults

    try:
        command = json.loads(Path(path).read_text(encoding="utf-8"))["header"]["command"]
    except (OSError, ValueError, RecursionError, KeyError, TypeError):
        command = ""
    return AgreementResults.load(path) if command == "agreement" else Answers.load(path)


def _figures(stem: str, results: "Results") -> "Iterator[tuple[str, Figure]]":
    from headinfer.evaluate.report.document import plot_name
    from headinfer.evaluate.report.plots import figure  # needs matplotlib

    drawn = figure(results) if isinstance(results, Answers) else None
    if drawn is not None:
        yield plot_name(stem), drawn
