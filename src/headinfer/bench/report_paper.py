"""The paper's tables, each cell as paper / measured here / predicted. Pure Python."""

from collections.abc import Callable, Iterator, Sequence

from headinfer.bench.catalogue import OFFLOADED
from headinfer.bench.document import Results
from headinfer.bench.held import DENSE
from headinfer.bench.model_spec import NamedModel
from headinfer.bench.result import Status
from headinfer.bench.rows import Row
from headinfer.bench.spec import Command
from headinfer.estimate.comparison import Comparison
from headinfer.estimate.methods import LAYER_WISE
from headinfer.estimate.paper import memory_table
from headinfer.estimate.paper_lengths import context_tables
from headinfer.estimate.paper_times import latency_tables, sparse_table
from headinfer.units import exact_bytes, parse_tokens

_GIB, _K = 2**30, 1024
_MODEL, _LARGE_MODEL = "llama-3-8b", "llama-3-70b"

Measured = Callable[[str, str], float | None]
"""What was measured for the label of a row and the name of a column; None where nothing was."""

_INTRO = """\
## The paper's tables

Each cell: paper / measured here / predicted. The paper measured on an RTX 4090 with 24 GiB, and the
predictions are for that card ([how](memory-model.md)). `{layer_wise}` is measured as
`{offloaded}`, which is transformers' own. A longest context measured here may have ended with the
machine's CPU memory: the table of the longest contexts says why each ended.
"""

_NONE = """\
Nothing is measured here yet: that takes a GPU, where `make bench-gpu` measures it."""


def paper_section(files: Sequence[Results]) -> str:
    """Return Tables 3 to 7, 10, 11 and 14 with what the files measured of the same models."""
    found = _Found(files)
    table_3, _, table_5, table_4, _ = context_tables()
    table_6, table_7 = latency_tables()
    parts = [_INTRO.format(layer_wise=LAYER_WISE, offloaded=OFFLOADED)]
    parts += [f"Measured on {found.where}." if found.where else _NONE, ""]
    for comparison, measured in (
        (table_3, found.longest),
        (table_4, found.longest_of_70b),
        (table_5, lambda method, _: found.longest(method, _MODEL)),
        (table_6, found.prefill_s),
        (table_7, found.decode_s),
        (memory_table(), found.memory_gib),
        (sparse_table(), found.seconds_at_1m),
    ):
        parts.extend(_table(comparison, measured))
    return "\n".join(parts)


def _table(comparison: Comparison, measured: Measured) -> Iterator[str]:
    yield f"### {comparison.title}, {comparison.unit}\n"
    yield f"| | {' | '.join(comparison.columns)} |"
    yield f"|---|{'---:|' * len(comparison.columns)}"
    write = _gib if comparison.unit == "GiB" else _three_digits
    for row in comparison.rows:
        cells = [
            _cell((paper, measured(row.label, column), ours), write)
            for column, paper, ours in zip(comparison.columns, row.paper, row.ours, strict=True)
        ]
        yield f"| {row.label} | {' | '.join(cells)} |"
    yield ""


def _cell(figures: Sequence[float | None], write: Callable[[float], str]) -> str:
    if all(figure is None for figure in figures):
        return "-"
    return " / ".join("-" if figure is None else write(figure) for figure in figures)


def _gib(figure: float) -> str:
    return f"{figure:.2f}" if figure < 99.995 else f"{figure:.0f}"


def _three_digits(figure: float) -> str:
    return f"{figure:.0f}" if figure >= 99.95 else f"{figure:.3g}"


class _Found:
    """A finding: what result files hold of the paper's models on a device."""

    def __init__(self, files: Sequence[Results]) -> None:
        self._files = [
            results
            for results in files
            if results.machine.device != "cpu" and isinstance(results.spec.model, NamedModel)
        ]

    @property
    def where(self) -> str:
        """The machines, in words."""
        names = set()
        for results in self._files:
            memory = results.spec.settings.device_memory_bytes
            held = "" if memory is None else f" held to {exact_bytes(memory)}"
            names.add(f"{results.machine.hardware['gpu']}{held}")
        return "; ".join(sorted(names))

    def longest(self, method: str, model: str) -> float | None:
        """Return the longest context found, in K tokens."""
        row = self._row(method, model, None, {Command.MAX_CONTEXT})
        return None if row is None else row.context_tokens / _K

    def longest_of_70b(self, label: str, _column: str) -> float | None:
        """Return the longest context of a row such as "head-wise-1, 10K chunks", in K tokens."""
        method, _, chunks = label.partition(", ")
        chunk = parse_tokens(chunks.removesuffix(" chunks")) if chunks else None
        row = self._row(method, _LARGE_MODEL, None, {Command.MAX_CONTEXT}, chunk)
        return None if row is None else row.context_tokens / _K

    def prefill_s(self, context: str, method: str) -> float | None:
        """Return the seconds of a prefill."""
        commands = {Command.PREFILL, Command.ABLATION}
        row = self._row(method, _MODEL, parse_tokens(context), commands)
        return None if row is None else row.prefill_s

    def decode_s(self, context: str, method: str) -> float | None:
        """Return the seconds of a decode step."""
        commands = {Command.DECODE, Command.ABLATION}
        row = self._row(method, _MODEL, parse_tokens(context), commands)
        return None if row is None else row.decode_s_per_token

    def seconds_at_1m(self, what: str, method: str) -> float | None:
        """Return the seconds of a prefill or a decode step at 1M tokens."""
        return self.prefill_s("1M", method) if what == "prefill" else self.decode_s("1M", method)

    def memory_gib(self, label: str, column: str) -> float | None:
        """Return GiB of a row such as "standard, 25K"."""
        method, context = label.split(", ")
        commands = {Command.MEMORY, Command.DECODE}
        row = self._row(method, _MODEL, parse_tokens(context), commands)
        if row is None:
            return None
        values = {
            "KV on device": row.kv_device_bytes,
            "total": row.device_peak_allocated_bytes,
            "KV in all": row.kv_bytes,
        }
        size_bytes = values.get(column)
        return None if size_bytes is None else size_bytes / _GIB

    def _row(
        self,
        method: str,
        model: str,
        context_tokens: int | None,
        commands: set[Command],
        chunk_tokens: int | None = None,
    ) -> Row | None:
        wanted = OFFLOADED if method == LAYER_WISE else method
        for results in self._files:
            of_model = isinstance(results.spec.model, NamedModel) and (
                results.spec.model.name == model
            )
            of_chunk = chunk_tokens in (None, results.spec.settings.chunk_tokens)
            if not (of_model and of_chunk) or results.spec.command not in commands:
                continue
            for row in results.rows:
                here = context_tokens in (None, row.context_tokens)
                is_papers = row.method == wanted and row.format == DENSE
                if is_papers and here and row.status is Status.OK:
                    return row
        return None
