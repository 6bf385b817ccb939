"""The plots of the report; needs matplotlib."""

import itertools
from collections.abc import Iterator

from matplotlib.figure import Figure

from headinfer.bench.catalogue import (
    AUTO,
    COMPILED,
    DRAFTS,
    EAGER,
    HOST_ATTENTION,
    OFFLOADED,
    SYNCHRONOUS,
    UNFUSED,
)
from headinfer.bench.document import Results
from headinfer.bench.report import Quantity, least_name, plot_name, quantities
from headinfer.bench.report_gpus import is_of_several
from headinfer.bench.rows import Row
from headinfer.bench.table import conditions
from headinfer.estimate.methods import (
    ADAPTIVE,
    BOUNDED,
    CHUNKED,
    FP8,
    HEAD_WISE_SPARSE,
    INT8,
    QUANTISED,
    RESIDENT,
    STANDARD,
)
from headinfer.plot.lines import BOUND, Line, Look, draw

_LOOKS = {
    STANDARD: Look(color="#000000", marker="o", width_points=2.6),
    CHUNKED: Look(color="#777777", marker="s"),
    COMPILED: Look(color="#444444", marker="D"),
    OFFLOADED: Look(color="#8c6d46", marker="^"),
    QUANTISED: Look(color="#cc79a7", marker="D"),
    "head-wise-8": Look(color="#7fb8de", marker="v"),
    "head-wise-4": Look(color="#56a0d3", marker="<"),
    "head-wise-2": Look(color="#0072b2", marker=">"),
    "head-wise-1": Look(color="#003f6b", marker="^"),
    ADAPTIVE: Look(color="#9a8a00", marker="P"),
    BOUNDED: Look(color="#009e73", marker="s"),
    RESIDENT: Look(color="#e69f00", marker="p"),
    EAGER: Look(color="#b8860b", marker="X"),
    UNFUSED: Look(color="#f0c75e", marker="*"),
    HOST_ATTENTION: Look(color="#882255", marker="h"),
    DRAFTS: Look(color="#332288", marker="P"),
    HEAD_WISE_SPARSE: Look(color="#44aa99", marker="v"),
    INT8: Look(color="#117733", marker="^"),
    FP8: Look(color="#6a3d9a", marker="v"),
    SYNCHRONOUS: Look(color="#999933", marker="d"),
    AUTO: Look(color="#d55e00", marker="o", width_points=3.2),
}
"""Look of each method in every plot: what people use in black and greys, ours in colours."""

_OTHER_COLORS = ("#117733", "#6699cc", "#aa4466", "#ddcc77", "#661100", "#999999")
"""Colours of methods without a look of their own, and of further forms, in the order of a run."""


def figures(name: str, results: Results) -> Iterator[tuple[str, Figure]]:
    """Yield file names and plots of a result file's stem."""
    if results.spec.command.finds_context or is_of_several(results):
        return
    for quantity in quantities(results):
        lines = list(_lines(results, quantity))
        if lines:
            model, where, *_ = conditions(results.spec, results.machine)
            figure = draw(
                f"{quantity.title}: {where}",
                model,
                quantity.axis,
                lines,
                quantity.text,
                base=quantity.base,
            )
            yield plot_name(name, quantity), figure


def _lines(results: Results, quantity: Quantity) -> Iterator[Line]:
    rows = results.arranged_rows
    bounds: dict[int, float] = {}
    others, seen = itertools.cycle(_OTHER_COLORS), set[str]()
    for variant in results.spec.variants:
        of_variant = [row for row in rows if row.variant == variant]
        points = tuple(_points(of_variant, quantity))
        for row in of_variant:
            bound = quantity.bound_of(row)
            if quantity.of(row) is not None and bound is not None:
                bounds[row.context_tokens] = min(bound, bounds.get(row.context_tokens, bound))
        if points:
            look = None if variant.method in seen else _LOOKS.get(variant.method)
            look = look or Look(color=next(others), marker="x")
            seen.add(variant.method)
            last = max(row.context_tokens for row in of_variant)
            yield Line(
                name=results.spec.name_of(variant),
                points=points,
                look=look,
                broken_off=points[-1][0] < last,
            )
    if bounds:
        name = least_name(results.spec.methods)
        yield Line(name=name, points=tuple(sorted(bounds.items())), look=BOUND)


def _points(rows: list[Row], quantity: Quantity) -> Iterator[tuple[int, float]]:
    for row in rows:
        value = quantity.of(row)
        if value is not None:
            yield row.context_tokens, value
