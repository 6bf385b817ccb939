"""Rows that a run which was cut off has finished. Scripts share it; it is no program of its own."""

import argparse
import json
import sys
from collections.abc import Set
from pathlib import Path
from typing import Any

from headinfer.bench.files import check_continues
from headinfer.errors import OptionError

_OF_THE_FILE = frozenset({"json", "resume"})


def add_options(parser: argparse.ArgumentParser, after: str) -> None:
    """Add `--json`, which is written anew after each of something, and `--resume`."""
    parser.add_argument("--json", required=True, help=f"results, written anew after every {after}")
    parser.add_argument("--resume", action="store_true", help="go on where --json stopped")


def settings_of(given: argparse.Namespace) -> dict[str, Any]:
    """Return what a result depends on of the options."""
    return {name: value for name, value in vars(given).items() if name not in _OF_THE_FILE}


def kept_rows(
    given: argparse.Namespace, header: dict[str, Any], *, but: Set[str] = frozenset()
) -> list[dict[str, Any]]:
    """Return the rows to go on with; none without `--resume`.

    A file of another commit, machine or settings ends the program with a line that says so.

    Args:
        given: the options, with those of `add_options`.
        header: of the run that begins, with `settings` among it.
        but: names of settings that may be others.
    """
    if not given.resume or not Path(given.json).exists():
        return []
    before: dict[str, Any] = json.loads(Path(given.json).read_text(encoding="utf-8"))
    try:
        check_continues(_told(before["header"]), _told(header), but=but)
    except OptionError as error:
        sys.exit(f"{Path(sys.argv[0]).name}: {error}")
    rows: list[dict[str, Any]] = before["rows"]
    return rows


def _told(header: dict[str, Any]) -> dict[str, Any]:
    """Return a header as those of the benchmarks are."""
    spec = {name: value for name, value in header["settings"].items() if name not in _OF_THE_FILE}
    return header | {"command": "this script", "device": header["hardware"]["gpu"], "spec": spec}
