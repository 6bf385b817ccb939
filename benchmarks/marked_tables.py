"""Tables that scripts write into documents, between a pair of marks each."""

import sys
from collections.abc import Mapping
from pathlib import Path


def between_marks(text: str, name: str, tables: str) -> str:
    """Return a document with other tables between its marks of a name."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    before, rest = text.split(begin)
    _, after = rest.split(end)
    return f"{before}{begin}\n{tables}\n{end}{after}"


def write(documents: Mapping[Path, str]) -> None:
    """Rewrite documents; with `--check` on the command line, fail if one is not up to date.

    Args:
        documents: what each is to be, by its path.
    """
    for path, wanted in documents.items():
        if "--check" not in sys.argv[1:]:
            path.write_text(wanted)
        elif path.read_text() != wanted:
            sys.exit(f"{path.name} differs from benchmarks/results")
