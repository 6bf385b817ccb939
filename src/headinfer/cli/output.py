"""Files that verbs write, and `--json [PATH]`; told before any work if they cannot be written."""

import errno
import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from headinfer.bench.files import check_replaceable
from headinfer.cli.command import OnceCommand
from headinfer.cli.console import ClosedStdout
from headinfer.cli.options import NO_VALUE, OUTPUT_PANEL
from headinfer.errors import OptionError

STDOUT = "-"
_JSON = "--json"


class JsonCommand(OnceCommand):
    """A command whose `--json` may stand without a path; Typer has no options of that kind."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Give a bare `--json` its path."""
        parsed = []
        for place, here in enumerate(args):
            after = args[place + 1] if place + 1 < len(args) else "--"
            parsed.append(here)
            if here == _JSON and after.startswith("-") and after != STDOUT:
                parsed.append(STDOUT)
        return super().parse_args(ctx, parsed)


JsonPath = Annotated[
    str | None,
    typer.Option(
        _JSON,
        metavar="[PATH]",
        help="Write results as JSON to PATH; alone, or with -, to stdout and nothing else there.",
        rich_help_panel=OUTPUT_PANEL,
    ),
]


Resume = Annotated[
    bool,
    typer.Option(
        "--resume",
        metavar=NO_VALUE,
        help="Go on where the run that wrote --json stopped.",
        rich_help_panel=OUTPUT_PANEL,
    ),
]


def check_writable(option: str, path: str | None) -> None:
    """Check that a file can be written.

    Args:
        option: for the message, such as "--json".
        path: the file's; None is always fine, and so is "-" of `--json`.

    Raises:
        OptionError: its folder is missing, or file or folder may not be written.
    """
    if path is None or (option == _JSON and path == STDOUT):
        return
    if path == STDOUT:
        raise OptionError(f"{option} {path!r}: only {_JSON} is for stdout; give the name of a file")
    if not path:
        raise OptionError(f"{option} '' names no file; give the name of a file")
    if os.path.isdir(Path(path)):
        raise OptionError(f"{option} {path!r} is a folder; give the name of a file")
    target = Path(os.path.realpath(path))  # of a link that leads nowhere, the file to be made
    if not os.path.exists(path) and not os.path.isdir(target.parent):
        raise OptionError(f"{option} {path!r}: there is no folder to write it in; make it first")
    if not _can_write(path, target):
        raise OptionError(f"{option} {path!r} may not be written; choose another place")


def check_results(path: str | None, *, resume: bool) -> None:
    """Check that results can be written to a file, row after row, and gone on with.

    Args:
        path: of `--json`.
        resume: whether the file is gone on with.

    Raises:
        OptionError: they cannot, or there is no file to go on with.
    """
    check_writable(_JSON, path)
    if path is not None and path != STDOUT:
        check_replaceable(path)
    elif resume:
        raise OptionError("--resume goes on with what --json FILE holds; give the file")


def _can_write(path: str, target: Path) -> bool:
    """Whether a file can be written; it is as before afterwards."""
    if os.path.exists(path) and not os.path.isfile(path):
        return os.access(path, os.W_OK)  # who reads from a pipe would take closing it for the end
    new = not os.path.lexists(target)
    try:
        with target.open("xb" if new else "ab"):
            pass
    except OSError:
        return False
    if new:
        target.unlink()
    return True


def write_json(path: str, document: dict[str, Any]) -> None:
    """Write a document to a file, or to stdout for "-".

    Raises:
        OptionError: it cannot be written.
    """
    text = json.dumps(document, indent=1)
    if path != STDOUT:
        try:
            Path(path).write_text(text + "\n", encoding="utf-8")
        except OSError as error:
            raise OptionError(f"{path!r} cannot be written ({error.strerror})") from error
    elif isinstance(sys.stdout, ClosedStdout):
        raise OptionError(f"stdout did not take the JSON: {os.strerror(errno.EBADF)}")
    else:
        typer.echo(text)
