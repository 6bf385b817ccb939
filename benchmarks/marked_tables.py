"""Documents with tables of results, which scripts write or compare."""

import sys
from collections.abc import Mapping
from pathlib import Path


def between_marks(text: str, name: str, tables: str) -> str:
    """Return a document with other tables between its marks of a name."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    before, rest = text.split(begin)
    _, after = rest.split(end)
    return f"{before}{begin}\n{tables}\n{end}{after}"


def write(documents: Mapping[Path, str]) -> bool:
    """Rewrite documents; with `--check` on the command line, fail if one is not up to date.

    Args:
        documents: what each is to be, by its path.

    Returns:
        Whether they were written.
    """
    only_compared = "--check" in sys.argv[1:]
    for path, wanted in documents.items():
        if not only_compared:
            path.write_text(wanted)
        elif path.read_text() != wanted:
            sys.exit(f"{path.name} differs from benchmarks/results")
    return not only_compared
