"""`headinfer evaluate report`: result files as a document with plots."""

import json
from pathlib import Path
from typing import Annotated

import typer

from headinfer.cli.bench_report import link
from headinfer.cli.console import reporting_errors, stderr_console
from headinfer.errors import OptionError
from headinfer.evaluate.answers.document import Answers
from headinfer.evaluate.report.document import Results, plot_name
from headinfer.evaluate.report.document import report as text_of
from headinfer.plot.files import check_plot


def report(
    files: Annotated[
        list[str], typer.Argument(metavar="FILES", help="What --json wrote, one or more.")
    ],
    out: Annotated[
        str, typer.Option("--out", metavar="PATH", help="The document to write.")
    ] = "docs/evaluation.md",
    plots: Annotated[
        str, typer.Option("--plots", metavar="FOLDER", help="Where plots go.")
    ] = "docs/plots",
) -> None:
    """Write results as a document with tables and plots, the paper's figures beside them."""
    with reporting_errors():
        folder, document = Path(plots), Path(out)
        if not document.parent.is_dir():
            raise OptionError(f"--out {out!r}: there is no folder to write it in; make it first")
        check_plot(str(folder / "plot.png"))
        results = [(Path(file).stem, _load(file)) for file in files]
        document.write_text(text_of(results, link(folder, document)), encoding="utf-8")
        console = stderr_console()
        console.print(f"written to {out}", markup=False)
        folder.mkdir(parents=True, exist_ok=True)
        for name, of_file in results:
            _draw(name, of_file, folder)
        console.print(f"plots in {plots}", markup=False)


def _load(path: str) -> Results:
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


def _draw(name: str, results: Results, folder: Path) -> None:
    from headinfer.evaluate.report.plots import figure
    from headinfer.plot.style import save

    drawn = figure(results) if isinstance(results, Answers) else None
    if drawn is not None:
        save(drawn, str(folder / plot_name(name)))
