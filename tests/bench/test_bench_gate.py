"""The gate, on results made by hand: it passes what is equal and nothing else."""

import math

import pytest
from bench_parts import logits_row, trial_result

from headinfer.bench.gate import LOGITS_TOLERANCE_PER_LAYER, Verdict, compare, logits_error
from headinfer.bench.result import TrialResult


def check(other: TrialResult, dtype: str = "float32") -> Verdict:
    return compare(trial_result(), other, dtype=dtype, layers=2, context_tokens=300)


def test_error_is_relative_to_the_length_of_the_reference():
    assert logits_error(logits_row(3, 4), logits_row(3, 4.5)) == pytest.approx(0.1)
    assert math.isnan(logits_error(logits_row(3, 4), logits_row(3, math.nan)))


@pytest.mark.parametrize("dtype", LOGITS_TOLERANCE_PER_LAYER)
def test_equal_results_pass(dtype):
    verdict = check(trial_result(), dtype)
    assert verdict.passed
    assert verdict.reason == ""
    assert (verdict.equal_tokens, verdict.tokens) == (3, 3)


def test_one_other_token_fails_in_float32_and_may_be_a_tie_in_16_bits():
    other = trial_result(tokens=(3, 1, 5))
    assert not check(other).passed
    assert "2 of 3 greedy tokens" in check(other).reason
    assert check(other, "bfloat16").passed


@pytest.mark.parametrize("dtype", LOGITS_TOLERANCE_PER_LAYER)
def test_the_tolerance_is_a_limit_on_both_sides(dtype):
    allowed = 2 * LOGITS_TOLERANCE_PER_LAYER[dtype]  # two layers
    assert check(trial_result(logits=(3.0, 4.0 + 5 * 0.9 * allowed)), dtype).passed
    beyond = check(trial_result(logits=(3.0, 4.0 + 5 * 1.1 * allowed)), dtype)
    assert not beyond.passed
    assert "logits are off" in beyond.reason


@pytest.mark.parametrize("dtype", LOGITS_TOLERANCE_PER_LAYER)
def test_not_a_number_fails(dtype):
    assert not check(trial_result(logits=(3.0, math.nan)), dtype).passed
    broken = trial_result(logits=(math.nan, 4.0))
    assert not compare(broken, broken, dtype=dtype, layers=2, context_tokens=300).passed
