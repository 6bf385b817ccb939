"""Write the tables of large models in three documents from the results in this folder.

Run `python benchmarks/gpus_tables.py` after a new result; `--check` only compares.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from marked_tables import between_marks, write

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "src"))

from headinfer.bench.catalogue import HEADS, LAYERS, with_host  # noqa: E402
from headinfer.bench.document import Results  # noqa: E402
from headinfer.bench.report_gpus import targets_table, times_table, title  # noqa: E402
from headinfer.units import format_bytes, format_seconds, format_tokens  # noqa: E402

RESULTS = Path(__file__).parent / "results"
SPLITS = {"several-gpus.md": LAYERS, "tensor-parallel.md": HEADS}
"""The split that each document is about."""


def measured(files: Sequence[Results]) -> str:
    """Return the times of all runs, in one table for those of a title."""
    of_title: dict[str, list[Results]] = {}
    for results in sorted(files, key=lambda each: (each.spec.model.layers, each.spec.gpus)):
        of_title.setdefault(title(results), []).append(results)
    return "\n".join(f"{words}:\n\n{times_table(*runs)}" for words, runs in of_title.items())


def four_bits(found: dict[str, Any]) -> str:
    """Return what `four_bits.py` found, with what it was measured on."""
    header = found["header"]
    hardware, versions = header["hardware"], header["versions"]
    weights = format_bytes(found["weights_bytes"])
    columns = ("context", "a token", "of the bound", "bound by", "resident", "planned", "by torch")
    lines = [
        f"{found['model']}'s shape has {weights} of random weights in 4 bits. "
        f"{hardware['gpu']} held to {header['settings']['device_memory']}, "
        f"{hardware['cpu_threads']} CPU threads.",
        f"Torch {versions['torch']}, transformers {versions['transformers']}, "
        f"bitsandbytes {header['bitsandbytes']}. Logits are off from stock's by "
        f"{found['logits_error']:.2g} of their length.",
        "Behind tokens drawn at random; GPU memory as planned, and the most that torch took.",
        "",
        "| " + " | ".join(columns) + " |",
        "|---:|---:|---:|---|---:|---:|---:|",
    ]
    lines += [
        f"| {format_tokens(row['context_tokens'])} | {format_seconds(row['decode_s_per_token'])} "
        f"| {row['bound_s'] / row['decode_s_per_token']:.0%} | {row['bound_by']} "
        f"| {format_tokens(row['resident_tokens'])} | {format_bytes(row['planned_device_bytes'])} "
        f"| {format_bytes(row['peak_reserved_bytes'])} |"
        for row in found["rows"]
    ]
    return "\n".join(lines) + "\n"


def of_split(split: str, files: Sequence[Results]) -> str:
    """Return the tables of the document about a split."""
    tables = targets_table(files, (split, with_host(split)))
    if split == LAYERS:
        tables = f"{tables}\n{measured(files)}".rstrip() + "\n"
    return tables


def main() -> None:
    """Rewrite the documents, or fail if they are not up to date."""
    files = [Results.load(str(path)) for path in sorted(RESULTS.glob("gpu[248]-*.json"))]
    tables = {name: of_split(split, files) for name, split in SPLITS.items()}
    tables["models.md"] = four_bits(json.loads((RESULTS / "gpu1-70b-4bit.json").read_text()))
    paths = {name: ROOT / "docs" / name for name in tables}
    write(
        {
            path: between_marks(path.read_text(), "gpus", tables[name].rstrip())
            for name, path in paths.items()
        }
    )


if __name__ == "__main__":
    main()
