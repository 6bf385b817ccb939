"""The plot of a pattern: scores by layer and KV head. Needs matplotlib."""

import textwrap
from collections.abc import Collection

from matplotlib.figure import Figure

from headinfer.heads.pattern import HeadPattern
from headinfer.plot.heat_map import Panel, draw

_SPARSITY = 0.5
_LINE_LETTERS = 96


def figure(pattern: HeadPattern, layers: Collection[int]) -> Figure:
    """Return a heat map of a pattern, with the heads marked that stream at half the heads.

    Args:
        pattern: whose scores are drawn.
        layers: those that attend all tokens.
    """
    streaming = pattern.streaming_heads(_SPARSITY, layers)
    most = max(score for row in pattern.scores for score in row) or 1.0
    panel = Panel(
        name=f"{pattern.model or 'pattern'}; black bar: streams at sparsity {_SPARSITY}",
        values={
            (str(layer), str(head)): max(score, 0.0) / most
            for layer in layers
            for head, score in enumerate(pattern.scores[layer])
        },
        marked=frozenset((str(layer), str(head)) for layer in layers for head in streaming[layer]),
    )
    return draw(
        "Heads that need all tokens: scores, in percent of the highest",
        "\n".join(textwrap.wrap(pattern.made, _LINE_LETTERS)),
        [panel],
        rows=[str(layer) for layer in layers],
        columns=[str(head) for head in range(max(pattern.kv_heads))],
        axes=("layer", "KV head"),
    )
