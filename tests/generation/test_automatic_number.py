"""How many tokens `draft="auto"` drafts, where a clock of the test's own says what passes take."""

import bisect
import itertools
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from timed_drafts import Clock, TimedAnswers

RECORD = Path(__file__).parents[2] / "benchmarks/results/drafts-acceptance.json"


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def recorded(model: str, text: str) -> list[bool]:
    """Return which drafts of a real model were right, one after the other, as a record says."""
    values = json.loads(RECORD.read_text())
    drafts = values["header"]["settings"]["drafts"]
    right: list[bool] = []
    for row in values["rows"]:
        if (row["model"], row["text"], row["drafter"]) == (model, text, "itself"):
            for accepted in itertools.chain(*row["accepted"]):
                right += [True] * accepted + [False] * (accepted < drafts)
    return right


def drafted(
    clock: Clock, right: list[bool], pass_s: Callable[[int], float], draft_s: float, tokens: int
) -> list[int]:
    """Return how many tokens were drafted for each pass of an answer; see `TimedAnswers`."""
    return TimedAnswers(clock, right, pass_s, draft_s).drafted(tokens)


def in_any_case(_tokens: int) -> float:
    return 0.2


def launched(tokens: int) -> float:
    """Seconds of a pass where that of one token is captured, and others are not."""
    return 0.06 if tokens == 1 else 0.12


def steep_beyond_eight(tokens: int) -> float:
    """Seconds of a pass that another kernel serves from nine tokens on."""
    return 0.1 if tokens <= 8 else 1.6


def slow_beyond_eight(tokens: int) -> float:
    return 0.1 + 0.03 * max(tokens - 8, 0)


@pytest.mark.covering(most=1)
@pytest.mark.parametrize("pass_s", [in_any_case, launched])
def test_cheap_drafts_are_as_many_as_a_pass_takes_at_once(
    clock: Clock, pass_s: Callable[[int], float]
) -> None:
    """A pass of 16 tokens is one that the CPU shares, and that is captured."""
    numbers = drafted(clock, recorded("gemma3-270m", "documents"), pass_s, 0.002, 160)
    assert numbers[:5] == [0] * 5, "some steps are timed first"
    assert numbers == sorted(numbers)
    assert numbers.index(15) < 20
    assert max(numbers) == 15


def test_the_number_falls_soon_where_drafts_turn_bad(clock: Clock) -> None:
    """As behind a passage that was quoted: all that was right before must not outweigh that."""
    numbers = drafted(clock, [True] * 200 + [False] * 60, in_any_case, 0.01, 240)
    taken = list(itertools.accumulate(number + 1 for number in numbers))
    fallen = numbers[bisect.bisect(taken, 200) :]
    assert 1 < fallen.count(15) <= 6
    assert fallen[-1] == 0
    assert sum(fallen) < 210, "drafts in vain"


def test_the_number_stays_where_more_rows_take_longer(clock: Clock) -> None:
    right = recorded("gemma3-270m", "documents")
    numbers = drafted(clock, right, slow_beyond_eight, 0.002, 160)
    assert numbers[-14:] == [7] * 14
    assert numbers.count(15) <= 5, "which are needed to know"


def test_half_of_the_drafts_are_tried_where_all_are_too_slow(clock: Clock) -> None:
    """By a line from 1 to 15 drafts, 7 would be slow as well."""
    numbers = drafted(clock, [True] * 300, steep_beyond_eight, 0.002, 240)
    assert numbers[5:15] == [1] * 5 + [15] * 5, "nothing between is timed"
    assert numbers[15:] == [7] * len(numbers[15:])
