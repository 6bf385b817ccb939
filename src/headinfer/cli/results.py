"""What the verbs that write result files share: rows collected, told and judged at the end."""

from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any, Protocol, TypeVar

from rich.console import Console, RenderableType

from headinfer.bench.result import Status
from headinfer.cli.output import STDOUT, write_json

Row = TypeVar("Row")


class ResultFile(Protocol):
    """A collection of results that is written anew after every row."""

    def save(self, path: str) -> None:
        """Replace a file by the results."""

    def to_json(self) -> dict[str, Any]:
        """Return the content of a result file."""


def collect(
    rows: Iterable[Row], keep: Callable[[Row], object], results: ResultFile, path: str | None
) -> KeyboardInterrupt | None:
    """Keep each row when it is there, and write the file anew.

    Args:
        rows: in the order that they are finished.
        keep: puts a row into the results.
        results: of the run.
        path: of `--json`.

    Returns:
        What stopped the run, if anything did.
    """
    try:
        for row in rows:
            keep(row)
            save(results, path)
    except KeyboardInterrupt as error:
        return error
    return None


def save(results: ResultFile, path: str | None) -> None:
    """Write what there is so far, where `--json` is a file."""
    if path not in (None, STDOUT):
        results.save(str(path))


def tell(
    results: ResultFile,
    table: Callable[[], RenderableType],
    path: str | None,
    console: Console,
    *,
    stopped: bool,
) -> None:
    """Print what is finished, and write it where it is wanted."""
    with suppress(OSError):  # the terminal may be gone
        console.print(table())
    if path == STDOUT:
        write_json(STDOUT, results.to_json())
    elif path is not None:
        results.save(path)
        if stopped:
            tell_kept(path, console)
            return
        with suppress(OSError):
            console.print(f"written to {path}", markup=False, soft_wrap=True)


def tell_kept(path: str | None, console: Console) -> None:
    """Say that a run which was stopped can go on, where `--json` is a file."""
    if path not in (None, STDOUT):
        line = f"{path} holds what is finished; --resume goes on from there"
        with suppress(OSError):
            console.print(line, markup=False, soft_wrap=True)


def exit_code(statuses: Iterable[Status]) -> int:
    """Return 0 when all that ran was right, and something ran; otherwise 1."""
    found = set(statuses)
    return 0 if Status.OK in found and found <= {Status.OK, Status.CANNOT_RUN} else 1
