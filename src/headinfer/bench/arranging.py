"""The order of rows, and how fast each is beside others of its run. Pure Python, never torch."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby

from headinfer.bench.catalogue import REFERENCE_METHOD
from headinfer.bench.held import DENSE
from headinfer.bench.result import Status
from headinfer.bench.rows import Row
from headinfer.bench.spec import BenchSpec


def arranged(spec: BenchSpec, rows: Sequence[Row]) -> list[Row]:
    """Return rows by context and in the order of the variants, with ratios."""
    order = {variant: place for place, variant in enumerate(spec.variants)}
    if spec.command.finds_context:
        return sorted(rows, key=lambda row: order[row.variant])
    ordered = sorted(rows, key=lambda row: (row.context_tokens, order[row.variant]))
    return [
        row
        for _, of_context in groupby(ordered, key=lambda row: row.context_tokens)
        for row in with_ratios(list(of_context))
    ]


def with_ratios(rows: Sequence[Row]) -> list[Row]:
    """Return the rows of one context, compared with the reference's and with dense ones' times."""
    reference = next((row for row in rows if row.method == REFERENCE_METHOD), None)
    if reference is not None and reference.status is not Status.OK:
        reference = None
    dense = {row.method: row for row in rows if row.kv_cache == DENSE}
    return [_compared(row, reference, dense.get(row.method)) for row in rows]


def _compared(row: Row, reference: Row | None, dense: Row | None) -> Row:
    """Return a row with how many times as fast it is as others of its context, where there are."""
    if reference is not None:
        row = replace(
            row,
            prefill_x_standard=_ratio(reference.prefill_s, row.prefill_s),
            decode_x_standard=_ratio(reference.decode_s_per_token, row.decode_s_per_token),
        )
    if dense is not None:
        row = replace(
            row,
            prefill_x_dense=_ratio(dense.prefill_s, row.prefill_s),
            decode_x_dense=_ratio(dense.decode_s_per_token, row.decode_s_per_token),
        )
    return row


def _ratio(other_s: float | None, seconds: float | None) -> float | None:
    return other_s / seconds if other_s and seconds else None
