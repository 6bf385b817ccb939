"""`docs/benchmarks.md` from result files: generated, never typed. Pure Python, never torch."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

from headinfer.bench.catalogue import DRAFTS
from headinfer.bench.document import Results
from headinfer.bench.report_gpus import gpus_section, is_of_several
from headinfer.bench.report_paper import paper_section
from headinfer.bench.result import Status
from headinfer.bench.rows import Row
from headinfer.bench.spec import Command, Fill
from headinfer.bench.table import conditions, notes
from headinfer.units import exact_bytes, format_bytes, format_seconds, format_tokens, plural

_INTRO = """\
# Benchmarks

Written by `headinfer bench report` from the files in
[benchmarks/results](../benchmarks/README.md), which also says how they are measured. Do not edit:
measure again. K tokens is 1024, GiB is 2**30.

Every method's logits were compared with stock transformers' before anything was timed. A method
that is not exact by design is marked with ~. Times are medians. The least possible time follows
from the rates of the same machine, measured in the same run. A decode step reads weights and KV
once. A prefill computes all matrix products. A method that did not run is listed with the reason.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantity:
    """A quantity of rows that a table and a plot show.

    Attributes:
        title: of both.
        axis: of the plot.
        of: the value in a row; None where it was not measured.
        bound_of: the least that is possible; None where nothing says.
        text: writes a value.
        stem: of the plot's file name.
        base: of the plot's ticks.
    """

    title: str
    axis: str
    of: Callable[[Row], float | None]
    bound_of: Callable[[Row], float | None]
    text: Callable[[float], str]
    stem: str
    base: int = 10


PREFILL = Quantity(
    title="Prefill",
    axis="prefill",
    of=lambda row: row.prefill_s,
    bound_of=lambda row: row.prefill_bound_s,
    text=format_seconds,
    stem="prefill",
)
DECODE = Quantity(
    title="Decode",
    axis="one decode step",
    of=lambda row: row.decode_s_per_token,
    bound_of=lambda row: row.decode_bound_s,
    text=format_seconds,
    stem="decode",
)
HOST_GROWTH = Quantity(
    title="Memory",
    axis="growth of resident memory",
    of=lambda row: row.peak_rss_growth_bytes,
    bound_of=lambda row: row.kv_bytes,
    text=format_bytes,
    stem="memory",
    base=2,
)
DEVICE_PEAK = Quantity(
    title="GPU memory",
    axis="peak of GPU memory allocated",
    of=lambda row: row.device_peak_allocated_bytes,
    bound_of=lambda row: None,
    text=format_bytes,
    stem="memory",
    base=2,
)


def quantities(results: Results) -> tuple[Quantity, ...]:
    """Return what a run's results are about."""
    command = results.spec.command
    if command is Command.MEMORY:
        growth = HOST_GROWTH if results.machine.device == "cpu" else DEVICE_PEAK
        return (growth, PREFILL) if results.spec.fill is Fill.PREFILL else (growth,)
    if command is Command.ABLATION:
        return (PREFILL, DECODE)
    return (PREFILL,) if command is Command.PREFILL else (DECODE,)


def plot_name(name: str, quantity: Quantity) -> str:
    """Return the file name of a plot of a result file's stem."""
    return f"{name}.png" if name.endswith(quantity.stem) else f"{name}-{quantity.stem}.png"


def report(files: Sequence[tuple[str, Results]], plots: str) -> str:
    """Return the document.

    Args:
        files: stems of result files, and what they hold.
        plots: folder of the plots as links of the document have it.
    """
    parts = [_INTRO]
    of_one = [file for file in files if not is_of_several(file[1])]
    ordered = sorted(of_one, key=lambda file: (_group(file[1]), _place(file[1])))
    for (where, model), of_group in groupby(ordered, key=lambda file: _group(file[1])):
        parts.append(f"## {where}: {model.split(',')[0]}\n\n{model}.\n")
        for name, results in of_group:
            parts.extend(_section(name, results, plots))
    parts.append(gpus_section(files))
    parts.append(paper_section([results for _, results in of_one]))
    return "\n".join(parts)


def _group(results: Results) -> tuple[str, str]:
    model, where, *_ = conditions(results.spec, results.machine)
    return where, model


def _place(results: Results) -> tuple[str, int]:
    """Return what runs of one group are ordered by."""
    return results.spec.command, min(results.spec.contexts)


def _title(quantity: Quantity, results: Results) -> str:
    """Return a heading that tells a run from others of its group."""
    contexts, memory = results.spec.contexts, results.spec.settings.device_memory_bytes
    ends = dict.fromkeys(map(format_tokens, (min(contexts), max(contexts))))
    held = "" if memory is None else f" in {exact_bytes(memory)}"
    return f"{quantity.title} at {' to '.join(ends)} {plural(max(contexts), 'token')}{held}"


def _section(name: str, results: Results, plots: str) -> Iterator[str]:
    """Yield one run's tables, plots and notes."""
    rows = results.arranged_rows
    _, _, *how = conditions(results.spec, results.machine)
    facts = "\n".join(f"- {fact}" for fact in (*how, _made(results)))
    if results.spec.command.finds_context:
        yield f"### Longest context that ran\n\n{facts}\n"
        yield _longest_table(results, rows)
        return
    for quantity in quantities(results):
        yield f"### {_title(quantity, results)}\n\n{facts}\n"
        yield _table(results, rows, quantity)
        yield f"![{quantity.title} over context]({plots}/{plot_name(name, quantity)})\n"
    listed = "\n".join(
        f"- {note}" for note in (*notes(results.spec, rows), *_not_measured(results))
    )
    yield f"{listed}\n"


def _not_measured(results: Results) -> Iterator[str]:
    """Yield what a run that was stopped did not get to."""
    measured = {(row.variant, row.context_tokens) for row in results.arranged_rows}
    for variant in results.spec.variants:
        missing = [at for at in results.spec.contexts if (variant, at) not in measured]
        if missing:
            contexts = ", ".join(map(format_tokens, missing))
            name = results.spec.name_of(variant)
            yield f"{name} at {contexts}: not measured, the run was stopped before"


def _made(results: Results) -> str:
    head = results.header
    versions, commit = head["versions"], head["commit"]
    at = f", commit {commit['id'][:10]}" if commit else ""
    return (
        f"{head['date'][:10]}, torch {versions['torch']}, transformers "
        f"{versions['transformers']}{at}"
    )


def _table(results: Results, rows: Sequence[Row], quantity: Quantity) -> str:
    """Return contexts down and variants across, without those that never ran."""
    by_place = {(row.variant, row.context_tokens): row for row in rows}
    variants = [
        variant
        for variant in results.spec.variants
        if any(row.variant == variant and quantity.of(row) is not None for row in rows)
    ]
    heads = [f"{results.spec.name_of(each)}{'' if each.exact else ' ~'}" for each in variants]
    least_of_all = least_name([variant.method for variant in variants])
    lines = [_line(["context", *heads, least_of_all]), _line(["---:"] * (len(variants) + 2))]
    for context in results.spec.contexts:
        cells = [_cell(by_place.get((variant, context)), quantity) for variant in variants]
        bounds = [
            bound
            for variant in variants
            if (row := by_place.get((variant, context))) is not None
            and (bound := quantity.bound_of(row)) is not None
        ]
        least = quantity.text(min(bounds)) if bounds else "-"
        lines.append(_line([format_tokens(context), *cells, least]))
    return "\n".join(lines) + "\n"


def least_name(methods: Iterable[str]) -> str:
    """Return how the least possible time is called: drafts may go below that of single tokens."""
    return "least possible" + (" without drafts" if DRAFTS in methods else "")


def _cell(row: Row | None, quantity: Quantity) -> str:
    value = None if row is None else quantity.of(row)
    return "-" if value is None else quantity.text(value)


def _longest_table(results: Results, rows: Sequence[Row]) -> str:
    lines = [_line(["method", "longest", "because"]), _line(["---", "---:", "---"])]
    for row in rows:
        ran = row.status in (Status.OK, Status.UNCHECKED)
        why = row.limited_by if ran else row.reason
        lines.append(
            _line(
                [
                    results.spec.name_of(row.variant),
                    format_tokens(row.context_tokens) if ran else "-",
                    why or "-",
                ]
            )
        )
    return "\n".join(lines) + "\n"


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"
