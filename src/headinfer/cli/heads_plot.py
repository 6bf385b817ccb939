"""The plot of a pattern: scores by layer and KV head. Needs matplotlib."""

import textwrap

from matplotlib.figure import Figure

from headinfer.heads.pattern import HeadPattern
from headinfer.plot.heat_map import Panel, draw

_SPARSITY = 0.5
_LINE_LETTERS = 96


def figure(pattern: HeadPattern) -> Figure:
    """Return a heat map of a pattern, with the heads marked that stream at half the heads."""
    scored = [layer for layer, row in enumerate(pattern.scores) if any(row)]
    streaming = pattern.streaming_heads(_SPARSITY, scored)
    most = max(score for row in pattern.scores for score in row) or 1.0
    panel = Panel(
        name=f"{pattern.model or 'pattern'}; black bar: streams at sparsity {_SPARSITY}",
        values={
            (str(layer), str(head)): max(score, 0.0) / most
            for layer, row in enumerate(pattern.scores)
            for head, score in enumerate(row)
            if layer in scored
        },
        marked=frozenset((str(layer), str(head)) for layer in scored for head in streaming[layer]),
    )
    return draw(
        "Heads that need all tokens: scores, in percent of the highest",
        "\n".join(textwrap.wrap(pattern.made, _LINE_LETTERS)),
        [panel],
        rows=[str(layer) for layer in scored],
        columns=[str(head) for head in range(max(pattern.kv_heads))],
        axes=("layer", "KV head"),
    )
