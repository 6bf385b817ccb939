"""How long samples are made."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headinfer.errors import OptionError
from headinfer.evaluate.ruler.fit import most_units


@given(
    overhead=st.integers(0, 500),
    each=st.integers(1, 90),
    step=st.integers(1, 30),
    most=st.integers(1, 200_000),
    last=st.none() | st.integers(1, 4000),
)
def test_one_step_more_would_be_too_long(
    overhead: int, each: int, step: int, most: int, last: int | None
) -> None:
    def tokens_of(units: int) -> int:
        return overhead + each * units

    first = min(step, last or step)
    if tokens_of(first) > most:
        with pytest.raises(OptionError, match=f"{tokens_of(first):,} tokens"):
            most_units(tokens_of, most, step, last)
        return
    units = most_units(tokens_of, most, step, last)
    assert units == first or units % step == 0
    assert tokens_of(units) <= most
    assert last is None or units <= last
    assert tokens_of(units + step) > most or (last is not None and units + step > last)


@given(seed=st.integers(0, 10**6), most=st.integers(1000, 500_000))
def test_lengths_that_vary_end_near_the_limit(seed: int, most: int) -> None:
    drawn = random.Random(seed)
    tried = []

    def tokens_of(units: int) -> int:
        tried.append(units)
        return round(60 + 25 * units + drawn.gauss(0, 3) * units**0.5)

    units = most_units(tokens_of, most, 5)
    assert 25 * units + 60 == pytest.approx(most, rel=0.02, abs=500)
    assert len(tried) <= 12


@pytest.mark.parametrize("most", [10**4, 10**5, 10**6, 10**7])
def test_all_tries_together_are_a_few_of_the_last(most: int) -> None:
    tried = []

    def tokens_of(units: int) -> int:
        tried.append(units)
        return 300 + 26 * units

    assert most_units(tokens_of, most, 5) * 26 == pytest.approx(most, abs=500)
    assert sum(tried) * 26 <= 4 * most
