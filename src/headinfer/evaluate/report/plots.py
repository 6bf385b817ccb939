"""The plots of the report; needs matplotlib."""

from matplotlib.figure import Figure

from headinfer.evaluate.answers.document import Answers
from headinfer.evaluate.answers.table import compared
from headinfer.plot.heat_map import Panel, draw
from headinfer.units import exact_bytes, format_tokens

_BY_DEPTH = ("needle", "figure7")
"""Tasks whose groups are depths."""


def figure(results: Answers) -> Figure | None:
    """Return heat maps of the scores by group and context, one a method; None without answers."""
    spec = results.spec
    panels: list[Panel] = []
    groups: list[str] = []
    for method in spec.methods:
        values, cut = {}, set()
        for context in spec.contexts:
            row = results.rows.get((method, context))
            scores = {} if row is None else spec.task.scores(row.records)
            for group, score in scores.items():
                if score is not None:
                    values[group, format_tokens(context)] = score
                    if row is not None and any(each.answer.is_cut for each in row.records):
                        cut.add((group, format_tokens(context)))
            groups = groups or list(scores)
        if values:
            panels.append(Panel(name=_name(results, method), values=values, marked=frozenset(cut)))
    if not panels:
        return None
    held = spec.settings.device_memory_bytes
    within = "" if held is None else f", memory held to {exact_bytes(held)}"
    if spec.settings.sparsity:
        within += f"; head-wise-sparse is approximate: {spec.settings.sparsity:.0%} of heads stream"
    if any(panel.marked for panel in panels):
        within += "; black bar: from prompts cut in the middle to what the method holds"
    return draw(
        f"{spec.task.name}: mean score, in percent",
        f"{spec.model.description.split(',')[0]}, {spec.dtype}{within}",
        panels,
        rows=groups,
        columns=[format_tokens(context) for context in spec.contexts],
        axes=("depth of the fact" if spec.task.name in _BY_DEPTH else "", "context (tokens)"),
    )


def _name(results: Answers, method: str) -> str:
    """Return a method's name, with how many of its answers are stock's."""
    likes = [
        like
        for context in results.spec.contexts
        if (row := results.rows.get((method, context))) and (like := compared(results, row))
    ]
    if not likes:
        return method
    same, asked = (sum(getattr(like, name) for like in likes) for name in ("same", "compared"))
    return f"{method}: {same} of {asked} answers are stock's"
