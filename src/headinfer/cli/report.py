"""What `bench report` and `evaluate report` share: result files in, a document with plots out."""

import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from headinfer.cli.console import stderr_console
from headinfer.errors import OptionError
from headinfer.plot.files import check_plot

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Results = TypeVar("Results")

Files = Annotated[
    list[str], typer.Argument(metavar="FILES", help="What --json wrote, one or more.")
]
Out = Annotated[str, typer.Option("--out", metavar="PATH", help="The document to write.")]
Plots = Annotated[str, typer.Option("--plots", metavar="FOLDER", help="Where plots go.")]


def write_report(
    files: Sequence[str],
    out: str,
    plots: str,
    *,
    load: Callable[[str], Results],
    text_of: Callable[[Sequence[tuple[str, Results]], str], str],
    figures: Callable[[str, Results], Iterable[tuple[str, "Figure"]]],
) -> None:
    """Write a document of result files, and its plots.

    Args:
        files: paths of the results.
        out: path of the document.
        plots: folder of the plots.
        load: reads a file.
        text_of: writes the document from stems and results, and the folder of plots as links have
            it.
        figures: draws the plots of a stem and its results, each with its file name.

    Raises:
        OptionError: a file cannot be read, or something cannot be written.
    """
    for file in files:  # first: the other paths may be the defaults
        if not os.path.exists(file):
            raise OptionError(f"results {file!r} are not there; give a file that --json wrote")
    folder, document = Path(plots), Path(out)
    if not document.parent.is_dir():
        raise OptionError(f"--out {out!r}: there is no folder to write it in; make it first")
    check_plot(str(folder / "plot.png"))
    results = [(Path(file).stem, load(file)) for file in files]
    document.write_text(text_of(results, _link(folder, document)), encoding="utf-8")
    console = stderr_console()
    console.print(f"written to {out}", markup=False)
    folder.mkdir(parents=True, exist_ok=True)

    from headinfer.plot.style import save

    for stem, of_file in results:
        for file_name, figure in figures(stem, of_file):
            save(figure, str(folder / file_name))
    console.print(f"plots in {plots}", markup=False)


def _link(folder: Path, document: Path) -> str:
    """Return the folder of plots as links in the document have it."""
    try:
        return folder.resolve().relative_to(document.resolve().parent).as_posix()
    except ValueError as error:
        raise OptionError(f"--plots {str(folder)!r} must be in the folder of --out") from error
