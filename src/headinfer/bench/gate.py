"""Whether a method's results are the reference's. Pure Python, never torch."""

import base64
import math
from array import array
from dataclasses import dataclass

from headinfer.bench.result import TrialResult

LOGITS_TOLERANCE_PER_LAYER = {"float32": 2.5e-5, "float16": 2e-3, "bfloat16": 1.5e-2}
"""Largest distance of a row of logits from the reference's, over the reference's length, for each
layer.

Two exact methods round differently, and every layer adds to the distance.

Measured on Llamas of 2 and 4 layers at 1K and 4K tokens, per layer: up to 3e-6, 8e-4 and 6e-3.

Measured with one KV head losing 256 of 4K tokens, in one layer and in decode alone: 0.03 or more in
any dtype.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """An outcome of one comparison.

    Attributes:
        passed: whether the results may be used.
        reason: what is wrong, for people; empty when passed.
        context_tokens: tokens of the prompt they were compared at.
        logits_error: the largest relative distance of any row of logits.
        logits_tolerance: what is allowed.
        equal_tokens: greedy tokens that are equal.
        tokens: greedy tokens compared.
    """

    passed: bool
    reason: str
    context_tokens: int
    logits_error: float
    logits_tolerance: float
    equal_tokens: int
    tokens: int


def compare(
    reference: TrialResult, result: TrialResult, *, dtype: str, layers: int, context_tokens: int
) -> Verdict:
    """Compare a result with the reference's; both were fed the same tokens.

    In float32 all greedy tokens must be equal. In every dtype each kept row of logits must be
    within the tolerance. Rows are kept after the prompt, and after the first decode steps. In 16
    bits the two likeliest tokens may tie, so tokens are counted but decide nothing.

    Args:
        reference: of the reference method.
        result: of the method in question.
        dtype: of weights and KV.
        layers: decoder layers of the model.
        context_tokens: tokens of the prompt, for the record.
    """
    tolerance = LOGITS_TOLERANCE_PER_LAYER[dtype] * layers
    pairs = list(zip(reference.greedy_tokens, result.greedy_tokens, strict=True))
    equal_tokens = sum(one == other for one, other in pairs)
    errors = [
        logits_error(one, other) for one, other in zip(reference.logits, result.logits, strict=True)
    ]
    worst = next((error for error in errors if math.isnan(error)), max(errors))
    reason = ""
    if math.isnan(worst):
        reason = "logits are NaN, infinite or all 0: overflow in this dtype, or damaged weights"
    elif worst > tolerance:
        reason = f"logits are off by {worst:.2g} of their length; {tolerance:.2g} is allowed"
    elif dtype == "float32" and equal_tokens < len(pairs):
        reason = f"only {equal_tokens} of {len(pairs)} greedy tokens are equal"
    return Verdict(
        passed=not reason,
        reason=reason,
        context_tokens=context_tokens,
        logits_error=worst,
        logits_tolerance=tolerance,
        equal_tokens=equal_tokens,
        tokens=len(pairs),
    )


def logits_error(reference: str, result: str) -> float:
    """Return the distance of two rows over the length of the first; NaN if any element is."""
    rows = []
    for text in (reference, result):
        row = array("f")
        row.frombytes(base64.b64decode(text))
        rows.append(row)
    distance = math.sqrt(sum((one - other) ** 2 for one, other in zip(*rows, strict=True)))
    length = math.sqrt(sum(one * one for one in rows[0]))
    return distance / length if length else math.nan
