"""Files that verbs write, and `--json [PATH]`; told before any work if they cannot be written."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from headinfer.cli.command import OnceCommand
from headinfer.cli.options import OUTPUT_PANEL
from headinfer.errors import OptionError

STDOUT = "-"


class JsonCommand(OnceCommand):
    """A command whose `--json` may stand without a path; Typer has no options of that kind."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Give a bare `--json` its path."""
        parsed = []
        for place, here in enumerate(args):
            after = args[place + 1] if place + 1 < len(args) else "--"
            parsed.append(here)
            if here == "--json" and after.startswith("-") and after != STDOUT:
                parsed.append(STDOUT)
        return super().parse_args(ctx, parsed)


JsonPath = Annotated[
    str | None,
    typer.Option(
        "--json",
        metavar="[PATH]",
        help="Write results as JSON to PATH; alone, or with -, to stdout and nothing else there.",
        rich_help_panel=OUTPUT_PANEL,
    ),
]


def check_writable(option: str, path: str | None) -> None:
    """Check that a file can be written.

    Args:
        option: for the message, such as "--json".
        path: as given; None and "-" are always fine.

    Raises:
        OptionError: its folder is missing, or file or folder may not be written.
    """
    if path is None or path == STDOUT:
        return
    file = Path(path)
    if not file.parent.is_dir():
        raise OptionError(f"{option} {path!r}: there is no folder to write it in; make it first")
    if file.is_dir():
        raise OptionError(f"{option} {path!r} is a folder; give the name of a file")
    existed = file.exists()
    try:
        with file.open("ab"):
            pass
    except OSError:
        raise OptionError(f"{option} {path!r} may not be written; choose another place") from None
    if not existed:
        file.unlink()


def write_json(path: str, document: dict[str, Any]) -> None:
    """Write a document to a file, or to stdout for "-"."""
    text = json.dumps(document, indent=1)
    if path == STDOUT:
        typer.echo(text)
    else:
        Path(path).write_text(text + "\n", encoding="utf-8")
