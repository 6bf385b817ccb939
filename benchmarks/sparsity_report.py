"""Write docs/sparsity.md and its plots from what `sparsity.py` measured.

Run `python benchmarks/sparsity_report.py` after a new result; `--check` only compares the text.
"""

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from marked_tables import write

from headinfer.units import counted

RESULTS = Path(__file__).parent / "results"
DOCS = Path(__file__).parents[1] / "docs"
INTRO = """\
# Streaming heads and what they cost

Written by `benchmarks/sparsity_report.py` from [benchmarks/results](../benchmarks/README.md). Do
not edit: run it again. `benchmarks/sparsity.sh` makes the results.
[tasks.md](tasks.md#patterns-of-heads) tells what patterns are, and what was found.

All figures are of the method `head-wise-sparse`, which is approximate. The share kept is that of
the KV heads that see all tokens. The others see the first and the newest tokens alone. Agreement is
with stock transformers, at every position of a text.
"""
STOCK, NO_HEAD = "none", "all"
"""Names of the patterns that keep all heads, and none."""

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#000000", "#555555", "#999999")
MARKERS = "osD^vX"


def shown(pattern: str) -> str:
    """Return a pattern's name for people."""
    return pattern.rpartition("-")[2].replace(":", ", seed ")


def described(recorded: str) -> str:
    """Return a model's description, which older results have with one of a thing in the plural."""
    return re.sub(
        r"\b(\d+) (layer|KV head)s\b", lambda found: counted(int(found[1]), found[2]), recorded
    )


def patterns_of(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Return the patterns that leave a choice of heads, in the order they were tried."""
    names = dict.fromkeys(row["pattern"] for row in rows)
    return [name for name in names if name not in (STOCK, NO_HEAD)]


def section(document: dict[str, Any], plot: str) -> str:
    """Return the part of one model."""
    head, rows = document["header"], document["rows"]
    versions, name = head["versions"], head["model"]["name"]
    (stock,) = [row for row in rows if row["pattern"] == STOCK]
    lines = [
        f"## {name}\n",
        f"- {described(head['model']['description'])}, {head['dtype']}",
        f"- {head['hardware']['cpu']}, {head['threads']} threads",
        f"- prompts and text of {head['context_tokens'] / 1024:g}K tokens, "
        f"{head['sink_tokens']} sinks, {head['recent_tokens']} newest tokens",
        f"- stock finds {stock['found']} of {stock['needles']} needles",
        f"- {head['date'][:10]}, torch {versions['torch']}, transformers "
        f"{versions['transformers']}, commit {head['commit']['id'][:10]}\n",
        f"![needles and agreement by share kept](plots/{plot})\n",
        "| share kept | pattern | needles found | same next token | KL mean | KL max |",
        "| ---: | --- | ---: | ---: | ---: | ---: |",
    ]
    place = {pattern: at for at, pattern in enumerate(patterns_of(rows))}
    for row in sorted(rows, key=lambda row: (row["sparsity"], place.get(row["pattern"], 0))):
        lines.append(
            f"| {1 - row['sparsity']:.0%} | {_pattern_cell(row)} | {row['found']} of "
            f"{row['needles']} | {row['agreement']:.1%} | {row['kl_mean']:.3f} "
            f"| {row['kl_max']:.2f} |"
        )
    return "\n".join(lines) + "\n"


def _pattern_cell(row: dict[str, Any]) -> str:
    if row["pattern"] == STOCK:
        return "stock"
    return "any" if row["pattern"] == NO_HEAD else shown(row["pattern"])


def figure(document: dict[str, Any]) -> Any:
    """Return needles and agreement against the share kept, a line for each pattern."""
    from matplotlib.ticker import FuncFormatter, NullFormatter, NullLocator

    from headinfer.plot.style import LABEL_POINTS, new_figure

    head, rows = document["header"], document["rows"]
    drawn, left = new_figure(
        f"{head['model']['name']}: what is left when heads stream (approximate)",
        f"{head['dtype']}, {head['context_tokens'] / 1024:g}K tokens, {head['sink_tokens']} sinks, "
        f"{head['recent_tokens']} newest tokens, a line for each pattern",
    )
    right = drawn.add_axes((0.565, 0.1, 0.405, 0.765))
    left.set_position((0.075, 0.1, 0.405, 0.765))
    quantities: tuple[tuple[Any, str, Callable[[dict[str, Any]], float]], ...] = (
        (left, "needles found", lambda row: row["found"] / row["needles"]),
        (right, "same next token as stock", lambda row: row["agreement"]),
    )
    for axes, quantity, value in quantities:
        axes.set_xscale("linear")
        axes.set_yscale("linear")
        for at, pattern in enumerate(patterns_of(rows)):
            points = sorted(
                (1 - row["sparsity"], value(row))
                for row in rows
                if row["pattern"] in (pattern, STOCK, NO_HEAD)
            )
            axes.plot(
                *zip(*points, strict=True),
                color=COLOURS[at],
                marker=MARKERS[at],
                linestyle="--" if pattern.startswith("random") else "-",
                linewidth=2,
                markersize=max(16 - 3 * at, 5),  # where lines coincide, all of them show
                label=shown(pattern),
            )
        axes.set_xlabel("share of KV heads that keep all tokens", fontsize=LABEL_POINTS + 1)
        axes.set_ylabel(quantity, fontsize=LABEL_POINTS + 1)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(FuncFormatter(lambda share, _: f"{share:.0%}"))
            axis.set_minor_locator(NullLocator())
            axis.set_minor_formatter(NullFormatter())
        axes.set_ylim(top=1.004)
        axes.tick_params(labelsize=LABEL_POINTS)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(which="major", color="#e6e6e6", linewidth=0.8)
    left.set_ylim(0, 1.04)
    right.legend(fontsize=LABEL_POINTS, frameon=False, loc="lower right")
    return drawn


def main() -> None:
    """Rewrite the document and its plots, or fail if the text is not up to date."""
    files = sorted(RESULTS.glob("sparsity-*.json"), reverse=True)
    documents = {file.stem: json.loads(file.read_text(encoding="utf-8")) for file in files}
    parts = [section(document, f"{stem}.png") for stem, document in documents.items()]
    text = "\n".join([INTRO, *parts])
    if write({DOCS / "sparsity.md": text}):
        for stem, document in documents.items():
            figure(document).savefig(DOCS / "plots" / f"{stem}.png")


if __name__ == "__main__":
    main()
