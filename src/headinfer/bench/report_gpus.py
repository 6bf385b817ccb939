"""What several GPUs were measured to reach, beside what was aimed at. Pure Python, never torch."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from headinfer.bench.catalogue import HEADS, LAYERS, ONE, with_host
from headinfer.bench.document import Results
from headinfer.bench.model_spec import NamedModel
from headinfer.bench.result import Status
from headinfer.bench.rows import Row
from headinfer.bench.spec import Command
from headinfer.bench.table import conditions, notes
from headinfer.bench.variant import Variant
from headinfer.units import counted, exact_bytes, format_seconds, format_tokens

_NOT_MEASURED = "not measured"

_K = 1024
_SMALL, _LARGE = "llama-3-8b", "llama-3-70b"

_INTRO = """\
## Several GPUs

`one` is one GPU. `layers` has layers on each, in one process, and `heads` has heads on each, with a
process for each. With `-host` the CPU attends a share. In brackets: the share of the method's own
bound that it reached. For layers that is the sum of what each GPU takes at least, as one works at a
time in decode. For heads it is the slowest rank's.
"""

Ratio = Callable[[Row, "Row | None", Results], float | None]
"""What is held against a limit: of a row, the row that it is compared with, and their run."""


def _of_other(row: Row, other: Row | None, results: Results) -> float | None:
    """Return a row's time over another's."""
    seconds, others = _seconds(row, results), other and _seconds(other, results)
    return seconds / others if seconds and others else None


def _of_bound(row: Row, _other: Row | None, _results: Results) -> float | None:
    """Return a row's time over its own bound."""
    return 1 / row.bound_fraction if row.bound_fraction else None


def _of_link(row: Row, _other: Row | None, results: Results) -> float | None:
    """Return a row's time over that of its streamed bytes on one link."""
    streamed = sum(part.streamed_bytes for part in row.parts)
    rate = results.machine.rates.link_bytes_per_s
    if not (streamed and rate and row.decode_s_per_token):
        return None
    return row.decode_s_per_token * rate / streamed


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A limit that was aimed at.

    Attributes:
        command: what is timed.
        model: a preset's name.
        method: that is to be fast enough.
        tokens: of the context.
        beside: the method it is compared with; None for none.
        words: what the time is divided by.
        ratio: that is held against the limit.
        limit: the most.
    """

    command: Command
    model: str
    method: str
    tokens: int
    beside: str | None = None
    words: str
    ratio: Ratio
    limit: float


def _decode(method: str, beside: str, tokens: int, limit: float) -> Target:
    return Target(
        command=Command.DECODE,
        model=_SMALL,
        method=method,
        tokens=tokens,
        beside=beside,
        words=f"`{beside}`",
        ratio=_of_other,
        limit=limit,
    )


def _link(tokens: int) -> Target:
    return Target(
        command=Command.DECODE,
        model=_SMALL,
        method=LAYERS,
        tokens=tokens,
        words="the bytes that both GPUs fetch, over one link",
        ratio=_of_link,
        limit=1.1,
    )


def _prefill(method: str) -> Target:
    return Target(
        command=Command.PREFILL,
        model=_SMALL,
        method=method,
        tokens=100 * _K,
        beside=ONE,
        words=f"`{ONE}`",
        ratio=_of_other,
        limit=0.6,
    )


def _large(method: str) -> Target:
    return Target(
        command=Command.DECODE,
        model=_LARGE,
        method=method,
        tokens=100 * _K,
        words="its own bound",
        ratio=_of_bound,
        limit=1.15,
    )


_LONG = (400 * _K, 800 * _K)
TARGETS = (
    *(_decode(HEADS, ONE, tokens, 0.45) for tokens in _LONG),
    *(_decode(with_host(HEADS), with_host(ONE), tokens, 0.6) for tokens in _LONG),
    *(_link(tokens) for tokens in _LONG),
    _prefill(LAYERS),
    _prefill(HEADS),
    _large(LAYERS),
    _large(HEADS),
)
"""What two GPUs were to reach."""
_GPUS = 2


def is_of_several(results: Results) -> bool:
    """Whether a run had several GPUs."""
    return results.spec.gpus > 1


def gpus_section(files: Iterable[tuple[str, Results]]) -> str:
    """Return the results of several GPUs, and what was aimed at.

    Args:
        files: stems of result files, and what they hold; those of one GPU are passed over.
    """
    found = [results for _, results in files if is_of_several(results)]
    parts = [_INTRO, targets_table(found)]
    for results in sorted(found, key=_place):
        parts.extend(_run(results))
    return "\n".join(parts)


def _place(results: Results) -> tuple[int, int, str]:
    return results.spec.model.layers, results.spec.gpus, results.spec.command


def targets_table(files: Sequence[Results], methods: Iterable[str] | None = None) -> str:
    """Return each target with what was measured of it.

    Args:
        files: results of several GPUs.
        methods: whose targets; None for all.
    """
    lines = [
        "| time of | model, context | over that of | at most | measured |",
        "|---|---|---|---:|---|",
    ]
    for target in TARGETS:
        if methods is not None and target.method not in methods:
            continue
        what = f"`{target.method}`, {target.command.value}"
        where = f"{target.model}, {format_tokens(target.tokens)}"
        lines.append(
            f"| {what} | {where} | {target.words} | {target.limit:g} | {_measured(target, files)} |"
        )
    return "\n".join(lines) + "\n"


def _measured(target: Target, files: Sequence[Results]) -> str:
    """Return what the newest of some files says of a target."""
    for results in sorted(files, key=lambda each: str(each.header["date"]), reverse=True):
        model = results.spec.model
        of_model = isinstance(model, NamedModel) and model.name == target.model
        if not of_model or results.spec.gpus != _GPUS or results.spec.command is not target.command:
            continue
        row = _row(results, target.method, target.tokens)
        other = None if target.beside is None else _row(results, target.beside, target.tokens)
        ratio = None if row is None else target.ratio(row, other, results)
        if ratio is not None:
            return f"{ratio:.2f}, {'reached' if ratio <= target.limit else 'not reached'}"
    return _NOT_MEASURED


def _row(results: Results, method: str, tokens: int) -> Row | None:
    """Return a row that ran and is right, in the first form of the run."""
    for row in results.arranged_rows:
        if (row.method, row.context_tokens, row.status) == (method, tokens, Status.OK):
            return row
    return None


def _seconds(row: Row, results: Results) -> float | None:
    prefills = results.spec.command.times_prefill
    return row.prefill_s if prefills else row.decode_s_per_token


def _run(results: Results) -> Iterator[str]:
    """Yield one run's table, conditions and notes."""
    model, where, *how = conditions(results.spec, results.machine)
    yield f"### {title(results)}\n"
    facts = (f"{model}; {where}", *how, _made(results))
    yield "\n".join(f"- {fact}" for fact in facts) + "\n"
    yield times_table(results)
    if told := notes(results.spec, results.arranged_rows):
        yield "\n".join(f"- {note}" for note in told) + "\n"


def title(results: Results) -> str:
    """Return what a run was of, in a few words."""
    spec = results.spec
    what = "longest context" if spec.command.finds_context else spec.command.value
    tokens = spec.settings.chunk_tokens
    chunks = "" if tokens == "auto" else f", chunks of {format_tokens(tokens)}"
    memory = spec.settings.device_memory_bytes
    held = "" if memory is None else f" held to {exact_bytes(memory)}"
    name, gpus = spec.model.description.split(",")[0], counted(spec.gpus, "GPU")
    return f"{name} on {gpus}{held}, {what}{chunks}"


def _made(results: Results) -> str:
    """Return when a run was made, and with which code."""
    versions, commit = results.header["versions"], results.header["commit"]
    at = f", commit {commit['id'][:10]}" if commit else ""
    date = results.header["date"][:10]
    return f"{date}, torch {versions['torch']}, transformers {versions['transformers']}{at}"


def times_table(*runs: Results) -> str:
    """Return contexts down and methods across, with the share of the bound in brackets.

    Args:
        runs: of one title (`title`). Each line is of one run, the newest first. A context has more
            than one line where an older run has methods that newer ones lack.
    """
    if runs[0].spec.command.finds_context:
        return _longest_table(runs)
    by_age = sorted(runs, key=lambda each: str(each.header["date"]))
    variants = dict.fromkeys(
        variant
        for run in by_age
        for variant in run.spec.variants
        if any(row.variant == variant for row in run.arranged_rows)
    )
    lines = [f"| context | {' | '.join(map(runs[0].spec.name_of, variants))} |"]
    lines.append(f"|---:|{'---:|' * len(variants)}")
    for tokens in sorted({row.context_tokens for run in runs for row in run.arranged_rows}):
        told: set[Variant] = set()
        for run in reversed(by_age):
            rows = {row.variant: row for row in run.arranged_rows if row.context_tokens == tokens}
            rows = {variant: row for variant, row in rows.items() if variant not in told}
            if rows:
                cells = [_cell(rows.get(variant), run) for variant in variants]
                lines.append(f"| {format_tokens(tokens)} | {' | '.join(cells)} |")
            told |= rows.keys()
    return "\n".join(lines) + "\n"


def _longest_table(runs: Sequence[Results]) -> str:
    """Return the longest context of each method, and why it is no longer."""
    lines = ["| method | longest | because |", "|---|---:|---|"]
    for run in runs:
        for row in run.arranged_rows:
            name, why = run.spec.name_of(row.variant), row.limited_by or row.reason
            lines.append(f"| {name} | {format_tokens(row.context_tokens)} | {why} |")
    return "\n".join(lines) + "\n"


def _cell(row: Row | None, results: Results) -> str:
    seconds = None if row is None else _seconds(row, results)
    if row is None or seconds is None:
        return "-"
    return f"{format_seconds(seconds)} ({row.bound_fraction or 0:.0%})"
