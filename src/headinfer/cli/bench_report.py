"""`headinfer bench report`: result files as a document with plots."""

from pathlib import Path
from typing import Annotated

import typer

from headinfer.bench.document import Results
from headinfer.bench.report import report as text_of
from headinfer.cli.console import reporting_errors, stderr_console
from headinfer.errors import OptionError
from headinfer.plot.files import check_plot


def report(
    files: Annotated[
        list[str], typer.Argument(metavar="FILES", help="What --json wrote, one or more.")
    ],
    out: Annotated[
        str, typer.Option("--out", metavar="PATH", help="The document to write.")
    ] = "docs/benchmarks.md",
    plots: Annotated[
        str, typer.Option("--plots", metavar="FOLDER", help="Where plots go.")
    ] = "docs/plots",
) -> None:
    """Write results as a document with tables and plots, the paper's tables beside them."""
    with reporting_errors():
        folder, document = Path(plots), Path(out)
        if not document.parent.is_dir():
            raise OptionError(f"--out {out!r}: there is no folder to write it in; make it first")
        check_plot(str(folder / "plot.png"))
        results = [(Path(file).stem, Results.load(file)) for file in files]
        console = stderr_console()
        document.write_text(text_of(results, link(folder, document)), encoding="utf-8")
        console.print(f"written to {out}", markup=False)
        folder.mkdir(parents=True, exist_ok=True)
        for name, of_file in results:
            _draw(name, of_file, folder)
        console.print(f"plots in {plots}", markup=False)


def link(folder: Path, document: Path) -> str:
    """Return the folder of plots as links in the document have it."""
    try:
        return folder.resolve().relative_to(document.resolve().parent).as_posix()
    except ValueError as error:
        raise OptionError(f"--plots {str(folder)!r} must be in the folder of --out") from error


def _draw(name: str, results: Results, folder: Path) -> None:
    from headinfer.bench.report_plots import figures
    from headinfer.plot.style import save

    for file_name, figure in figures(name, results):
        save(figure, str(folder / file_name))
