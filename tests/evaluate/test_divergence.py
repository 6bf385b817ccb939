"""Divergences and ties against their definitions, one position at a time."""

import math

import pytest
import torch

from headinfer.evaluate import divergence
from headinfer.evaluate.divergence import Tally, divergences, tied


def logits(*rows: tuple[float, ...]) -> torch.Tensor:
    return torch.tensor(rows)


def test_divergence_is_that_of_the_definition() -> None:
    generator = torch.Generator().manual_seed(0)
    true, given = (torch.randn(5, 11, generator=generator) * 4 for _ in range(2))
    found = divergences(true, given)
    assert found.dtype == torch.float64
    for position in range(5):
        p = [math.exp(value) for value in true[position].tolist()]
        q = [math.exp(value) for value in given[position].tolist()]
        expected = sum(
            a / sum(p) * math.log((a / sum(p)) / (b / sum(q))) for a, b in zip(p, q, strict=True)
        )
        assert float(found[position]) == pytest.approx(expected, rel=1e-10)
    assert divergences(true, given).tolist() != divergences(given, true).tolist()


def test_a_shift_of_all_logits_is_no_divergence() -> None:
    true = logits((1.0, 2.0, -3.0))
    assert divergences(true, true + 4).tolist() == [0.0]


def test_small_divergences_keep_their_digits() -> None:
    true = logits((0.0, 0.0)).double()
    moved = logits((1e-6, 0.0)).double()
    assert float(divergences(true, moved)) == pytest.approx(1e-12 / 8, rel=1e-3)


def test_tokens_that_both_rule_out_add_nothing() -> None:
    ruled_out = logits((0.0, 1.0, -math.inf))
    assert divergences(ruled_out, ruled_out).tolist() == [0.0]
    assert divergences(logits((0.0, 1.0, 2.0)), ruled_out).tolist() == [math.inf]


@pytest.mark.parametrize(
    ("dtype", "apart", "is_tie"),
    [
        (torch.bfloat16, 0.0625, True),  # neighbours among bfloat16's numbers from 8 to 16
        (torch.bfloat16, 0.125, False),
        (torch.float16, 0.0078125, True),
        (torch.float16, 0.0625, False),
        (torch.float32, 2**-20, True),
        (torch.float32, 0.0078125, False),
    ],
)
def test_ties_are_one_rounding_apart(dtype: torch.dtype, apart: float, is_tie: bool) -> None:
    for sign in (1, -1):
        best = 10.0 * sign
        rows = logits((-30.0, best - apart, best)).to(dtype)
        assert tied(rows, dtype).tolist() == [is_tie]


def test_a_tally_counts_positions_differences_and_ties(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(divergence, "_SLICE_BYTES", 2 * 3 * 8)  # two positions at a time
    stock = logits((5, 1, 0), (5, 5, 0), (0, 1, 5), (5, 1, 0), (0, 5, 5)).bfloat16()
    method = logits((5, 1, 0), (1, 5, 0), (5, 1, 0), (4, 1, 0), (0, 5, 5)).bfloat16()
    tally = Tally(torch.bfloat16)
    for part in (slice(0, 1), slice(1, 5)):
        tally.add(stock[part], method[part])
    assert (tally.positions, tally.differing, tally.ties) == (5, 2, 1)
    each = divergences(stock, method)
    assert tally.from_stock.mean == pytest.approx(float(each.mean()))
    assert tally.from_stock.largest == float(each.max()) == float(each[2])


def test_a_tally_holds_both_against_the_precise_one() -> None:
    generator = torch.Generator().manual_seed(0)
    precise = torch.randn(9, 20, generator=generator)
    stock, method = precise.bfloat16(), precise.half()
    tally = Tally(torch.bfloat16)
    tally.add(stock, method, precise)
    assert tally.from_float32.mean == pytest.approx(float(divergences(precise, method).mean()))
    assert tally.stock_from_float32.mean == pytest.approx(float(divergences(precise, stock).mean()))
    assert 0 < tally.from_float32.mean < tally.stock_from_float32.mean


def test_nan_is_no_agreement() -> None:
    tally = Tally(torch.float32)
    stock = logits((1.0, 0.0), (1.0, 0.0))
    tally.add(stock[:1], logits((math.nan, math.nan)))
    tally.add(stock[1:], stock[1:])  # a number afterwards does not hide it
    assert tally.differing == 1
    assert math.isnan(tally.from_stock.mean)
    assert math.isnan(tally.from_stock.largest)
