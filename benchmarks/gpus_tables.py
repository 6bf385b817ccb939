"""Write the tables of several GPUs in two documents from the results in this folder.

Run `python benchmarks/gpus_tables.py` after a new result; `--check` only compares.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "src"))

from headinfer.bench.catalogue import HEADS, LAYERS, with_host  # noqa: E402
from headinfer.bench.document import Results  # noqa: E402
from headinfer.bench.report_gpus import targets_table, times_table, title  # noqa: E402

RESULTS = Path(__file__).parent / "results"
BEGIN, END = "<!-- gpus: begin -->", "<!-- gpus: end -->"
SPLITS = {"several-gpus.md": LAYERS, "tensor-parallel.md": HEADS}
"""The split that each document is about."""


def measured(files: Sequence[Results]) -> str:
    """Return the times of all runs, in one table for those of a title."""
    of_title: dict[str, list[Results]] = {}
    for results in sorted(files, key=lambda each: (each.spec.model.layers, each.spec.gpus)):
        of_title.setdefault(title(results), []).append(results)
    return "\n".join(f"{words}:\n\n{times_table(*runs)}" for words, runs in of_title.items())


def updated(text: str, split: str, files: Sequence[Results]) -> str:
    """Return a document with the tables of its split between the marks."""
    tables = targets_table(files, (split, with_host(split)))
    if split == LAYERS:
        tables = f"{tables}\n{measured(files)}".rstrip() + "\n"
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n{tables}{END}{after}"


def main() -> None:
    """Rewrite the documents, or fail if they are not up to date."""
    files = [Results.load(str(path)) for path in sorted(RESULTS.glob("gpu[248]-*.json"))]
    for name, split in SPLITS.items():
        path = ROOT / "docs" / name
        text = path.read_text()
        wanted = updated(text, split, files)
        if "--check" not in sys.argv[1:]:
            path.write_text(wanted)
        elif text != wanted:
            sys.exit(f"docs/{name} differs from benchmarks/results")


if __name__ == "__main__":
    main()
