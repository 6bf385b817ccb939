"""`docs/evaluation.md` from result files: generated, never typed. Pure Python."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from headinfer.bench.catalogue import CATALOGUE, REFERENCE_METHOD
from headinfer.evaluate.agreement.document import AgreementResults
from headinfer.evaluate.agreement.table import conditions as agreement_conditions
from headinfer.evaluate.agreement.table import markdown as agreement_table
from headinfer.evaluate.agreement.table import notes as agreement_notes
from headinfer.evaluate.answers.document import Answers
from headinfer.evaluate.answers.run import AnswersRow
from headinfer.evaluate.answers.table import compared, conditions, notes, percent, seen
from headinfer.evaluate.report import paper
from headinfer.plan.streaming import RANDOM
from headinfer.units import counted, exact_bytes, format_tokens

Results = Answers | AgreementResults

_INTRO = """\
# Evaluation

Written by `headinfer evaluate report` from the files in
[benchmarks/results](../benchmarks/README.md). Do not edit: run it again. K tokens is 1024, GiB is
2**30. `make evaluate` makes those files on a CPU.

Every method is given the same prompts and answers greedily. An exact method must give stock
transformers' answers, token by token. In float32 another answer is an error. In 16 bits the order
of sums may turn a tie between the two best tokens, and such answers are counted apart. A method
marked with ~ is not exact by design.
"""

_CAPPED = """\
Every method has the memory of one small card here. A method that lacks memory for a prompt answers
from one that is cut in the middle to what it holds. The rows of the paper's tables do the same.
"""


@dataclass(frozen=True, slots=True)
class _Part:
    """A part of the document: a kind of run, its heading, and what the paper says of it."""

    verb: str
    capped: bool
    heading: str


_PARTS = (
    _Part("agreement", False, "Agreement of next tokens"),
    _Part("needle", False, "Needle in a haystack (Figure 6)"),
    _Part("figure7", False, "A sentence off the theme (Figure 7)"),
    _Part("ruler", False, "RULER (Table 9)"),
    _Part("longbench-v2", False, "LongBench v2 (Table 1)"),
    _Part("scbench", False, "SCBench (Table 2)"),
    _Part("needle", True, "Needle under one memory cap (Figure 6)"),
    _Part("figure7", True, "A sentence off the theme under one memory cap (Figure 7)"),
    _Part("ruler", True, "RULER under one memory cap (Tables 8 and 9)"),
    _Part("longbench-v2", True, "LongBench v2 under one memory cap (Table 1)"),
    _Part("scbench", True, "SCBench under one memory cap (Table 2)"),
)


def report(files: Sequence[tuple[str, Results]], plots: str) -> str:
    """Return the document.

    Args:
        files: stems of result files, and what they hold.
        plots: folder of the plots as links of the document have it.
    """
    parts = [_INTRO]
    for part in _PARTS:
        of_part = [file for file in files if _belongs(file[1], part)]
        if not of_part:
            continue
        parts.append(f"## {part.heading}\n")
        if part.verb in paper.SAID:
            parts.append(f"{paper.SAID[part.verb]}\n")
        if part.capped:
            parts += [_CAPPED, *_papers_table(part.verb)]
        for name, results in of_part:
            parts += (
                _agreement(results)
                if isinstance(results, AgreementResults)
                else (_answers(name, results, plots))
            )
    return "\n".join(parts)


def _belongs(results: Results, part: _Part) -> bool:
    capped = results.spec.settings.device_memory_bytes is not None
    if isinstance(results, AgreementResults):
        return part.verb == "agreement"
    return results.spec.task.name == part.verb and capped == part.capped


def _agreement(results: AgreementResults) -> Iterator[str]:
    yield f"### {_title(results)}\n"
    yield _facts((*agreement_conditions(results), _made(results.header)))
    yield agreement_table(results)
    yield _facts(agreement_notes(results.arranged_rows))


def _answers(name: str, results: Answers, plots: str) -> Iterator[str]:
    """Yield one run's plot, tables and notes."""
    yield f"### {_title(results)}\n"
    yield _facts((*conditions(results), _made(results.header)))
    if any(row.records for row in results.rows.values()):
        yield f"![{results.spec.task.name}: score by method]({plots}/{plot_name(name)})\n"
    yield _score_table(results)
    yield from _group_tables(results)
    remarks = (
        f"{row.method} at {format_tokens(row.context_tokens)}: {remark}"
        for row in results.arranged_rows
        for remark in results.spec.task.remarks(row.records)
    )
    yield _facts((*notes(results.arranged_rows), *remarks))


def plot_name(name: str) -> str:
    """Return the file name of the plot of a result file's stem."""
    return f"{name}.png"


def _title(results: Results) -> str:
    """Return a heading that tells a run from others of its part."""
    spec = results.spec
    hardware = results.header["hardware"]
    where = hardware["gpu"] or "CPU"
    held = spec.settings.device_memory_bytes
    within = "" if held is None else f", {exact_bytes(held)}"
    if spec.settings.sparsity:
        pattern = Path(spec.settings.head_pattern or RANDOM).stem
        within += f", {spec.settings.sparsity:.0%} of heads streaming by {pattern} ~"
    return f"{spec.model.description.split(',')[0]}, {spec.dtype}, {where}{within}"


def _score_table(results: Answers) -> str:
    """Return contexts down and methods across: the score, what was seen, and whether as stock."""
    spec = results.spec
    heads = [_marked(method) for method in spec.methods]
    lines = [_line(["context", *heads]), _line(["---:"] * (len(heads) + 1))]
    for context in spec.contexts:
        cells = [_cell(results, results.rows.get((method, context))) for method in spec.methods]
        lines.append(_line([format_tokens(context), *cells]))
    return "\n".join(lines) + "\n"


def _cell(results: Answers, row: AnswersRow | None) -> str:
    """Return a row's score in percent, with what a reader must know of it."""
    if row is None or row.score is None:
        return "-"
    told = [percent(row)]
    if any(record.answer.is_cut for record in row.records):
        told.append(f"saw {seen(row)}")
    if len(row.records) < results.spec.task.questions(row.context_tokens):
        told.append(f"{counted(len(row.records), 'answer')} alone")
    like = compared(results, row)
    if like is not None:
        told.append(f"{like.same} of {like.compared} as stock")
        if like.tied:
            told.append(f"{like.tied} by a tie")
    return ", ".join(told)


def _group_tables(results: Answers) -> Iterator[str]:
    """Yield the scores by group: one table a method, but for those that equal stock's."""
    task = results.spec.task
    scores = {key: task.scores(row.records) for key, row in results.rows.items()}
    for method in results.spec.methods:
        of_method = {
            context: scores[method, context]
            for context in results.spec.contexts
            if (method, context) in scores
        }
        groups = list(next(iter(of_method.values()), {}))
        if len(groups) < 2:
            continue
        equal = method != REFERENCE_METHOD and all(
            scores.get((REFERENCE_METHOD, context)) == found for context, found in of_method.items()
        )
        if equal:
            yield f"{method}: by group, the scores of {REFERENCE_METHOD}.\n"
            continue
        lines = [_line([_marked(method), *groups]), _line(["---:"] * (len(groups) + 1))]
        lines += [
            _line([format_tokens(context), *map(_percent, found.values())])
            for context, found in of_method.items()
        ]
        yield "\n".join(lines) + "\n"


def _percent(score: float | None) -> str:
    return "-" if score is None else f"{100 * score:.1f}"


def _marked(method: str) -> str:
    return method if CATALOGUE[method].exact else f"{method} ~"


def _papers_table(verb: str) -> Iterator[str]:
    """Yield the paper's own figures."""
    tables: Mapping[str, Mapping[str, Mapping[str, float]]] = {
        "longbench-v2": paper.LONGBENCH_V2,
        "scbench": paper.SCBENCH,
    }
    if verb == "ruler":
        told = ", ".join(f"{method} {most}" for method, most in paper.RULER_LONGEST.items())
        yield f"The longest of RULER's lengths in the paper's Table 8: {told}.\n"
    if verb not in tables:
        return
    rows = tables[verb]
    groups = list(next(iter(rows.values())))
    lines = [_line(["the paper", *groups]), _line(["---", *["---:"] * len(groups)])]
    lines += [
        _line([name, *(f"{each:.1f}" for each in row.values())]) for name, row in rows.items()
    ]
    yield "\n".join(lines) + "\n"


def _made(head: Mapping[str, object]) -> str:
    """Return when and with what a run was made."""
    versions, commit = head["versions"], head["commit"]
    assert isinstance(versions, Mapping)
    at = f", commit {commit['id'][:10]}" if isinstance(commit, Mapping) else ""
    return (
        f"{str(head['date'])[:10]}, torch {versions['torch']}, transformers "
        f"{versions['transformers']}{at}"
    )


def _facts(facts: Iterable[str]) -> str:
    return "".join(f"- {fact}\n" for fact in facts)


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"
