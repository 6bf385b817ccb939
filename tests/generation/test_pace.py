"""How many tokens are drafted: by known times and acceptance, and as an answer goes on."""

import collections
import itertools

import pytest

from headinfer.generation.cheapest import best_number, expected_tokens, number_to_try
from headinfer.generation.measured_pace import MeasuredPace


@pytest.mark.parametrize(
    ("draft_s", "pass_s", "acceptance", "expected"),
    [
        (10, {0: 100}, 0.0, 0),
        (10, {0: 100}, 1.0, 16),
        (10, {0: 100}, 0.5, 2),
        (10, {0: 100}, 0.9, 10),
        (60, {0: 100}, 0.3, 0),  # a step is under two drafts
        (60, {0: 100}, 0.9, 2),
        (96, {0: 100}, 1.0, 0),  # a gain of a twentieth is none
        (1, {0: 100, 4: 500}, 1.0, 0),  # a pass of several rows takes as long as so many steps
        (1, {0: 100, 4: 120}, 0.9, 12),
    ],
)
def test_a_number_makes_a_token_cheapest(
    draft_s: float, pass_s: dict[int, float], acceptance: float, expected: int
) -> None:
    assert best_number(draft_s, pass_s, acceptance, range(17)) == expected


@pytest.mark.parametrize("draft_s", [1, 10, 50])
@pytest.mark.parametrize("acceptance", [0.2, 0.6, 0.95])
def test_it_is_the_best_of_all(draft_s: float, acceptance: float) -> None:
    """By trying out each number where passes take as long whatever they verify."""

    def token_s(drafts: int) -> float:
        tokens = 1 + sum(acceptance**each for each in range(1, drafts + 1))
        return (100 + drafts * draft_s) / tokens

    best = min(range(9), key=token_s)
    gains = token_s(best) < token_s(0) / 1.05
    assert best_number(draft_s, {0: 100}, acceptance, range(9)) == (best if gains else 0)


def test_a_number_stays_where_another_one_gains_little() -> None:
    """A pass of as many tokens as before is captured."""
    few = [0, 1, 2, 3, 5, 7]
    assert best_number(10, {0: 100}, 0.7, few) == 5
    assert best_number(10, {0: 100}, 0.7, few, 3) == 3
    assert best_number(10, {0: 100}, 0.7, few, 1) == 5
    assert best_number(10, {0: 100}, 0.0, few, 5) == 0


def test_times_between_known_ones_lie_on_a_line() -> None:
    """With drafts for nothing that are all accepted, the number shows what a pass is taken for."""
    assert best_number(0, {0: 100, 8: 100, 9: 1000}, 1.0, range(10)) == 8
    assert best_number(0, {0: 100, 2: 100, 4: 1000}, 1.0, range(4)) == 2
    assert expected_tokens(3, 0.5) == 1.875


def test_longer_passes_go_on_as_those_with_drafts_did() -> None:
    """The step without drafts may be captured, or attended by other kernels."""
    assert best_number(1, {0: 50, 1: 100, 3: 104}, 0.9, range(16)) == 15
    assert best_number(1, {0: 50, 1: 52, 3: 150}, 0.9, range(16)) == 1
    assert best_number(1, {0: 50, 1: 100}, 0.9, range(16)) == 0, "nothing else is known of a draft"


@pytest.mark.parametrize("slow_from", [4, 8])
def test_a_number_that_turns_slow_is_halved_until_it_pays(slow_from: int) -> None:
    """As where the context has grown so that another kernel serves passes of some rows."""
    run = Run(MeasuredPace(31, 1), draft_s=1, step_s=100, rate=0.97)
    run.go(20)
    assert run.go(1) == [31]
    run.slow_from = slow_from
    assert run.go(30)[-1] == slow_from - 1


@pytest.mark.parametrize(("acceptance", "expected"), [(0.3, 1), (0.97, 7)])
def test_a_number_is_halved_only_where_acceptance_would_have_it_pay(
    acceptance: float, expected: int
) -> None:
    known = {0: 100, 1: 100, 15: 900}
    assert number_to_try(10, known, acceptance, [0, 1, 2, 3, 5, 7, 11, 15], 15) == expected


def test_a_captured_step_keeps_no_drafts_from_being_tried() -> None:
    """It is one launch, and passes with drafts take three times as long, however many they have."""
    pace = MeasuredPace(15, 1)
    run = Run(pace, draft_s=5, step_s=50, rate=0.95)
    run.go(5)
    run.step_s = 150
    assert run.go(5) == [1] * 5
    assert run.go(15)[-1] == 15


class Run:
    """An answer whose passes take known times and whose drafts are accepted in a known way."""

    def __init__(self, pace: MeasuredPace, draft_s: float, step_s: float, rate: float) -> None:
        self.pace, self.draft_s, self.step_s, self.rate = pace, draft_s, step_s, rate
        self.tokens, self.seconds = 1000, 0.0
        self.slow_from = 10**9  # drafts, whose passes take nine times as long
        self._turn = 0.0

    def go(self, verifications: int) -> list[int]:
        numbers = []
        for _ in range(verifications):
            drafts = self.pace.number(self.tokens)
            numbers.append(drafts)
            if drafts:
                self.pace.note_draft(drafts, drafts * self.draft_s)
            pass_s = self.step_s * (9 if drafts >= self.slow_from else 1)
            self.pace.note_pass(drafts, pass_s)
            accepted = 0
            while accepted < drafts and self._accepts():
                accepted += 1
            if drafts:
                self.pace.note_accepted(accepted, rejected=accepted < drafts)
            self.seconds += drafts * self.draft_s + pass_s
            self.tokens += accepted + 1
        return numbers

    def _accepts(self) -> bool:
        self._turn += self.rate
        accepts = self._turn >= 1
        self._turn -= accepts
        return accepts


def test_a_pace_follows_acceptance() -> None:
    run = Run(MeasuredPace(16, 1), draft_s=10, step_s=100, rate=0.9)
    assert run.go(5) == [0] * 5, "some steps are timed first"
    assert run.go(5) == [1] * 5
    assert all(number in (5, 7, 11, 15) for number in run.go(20)[5:])
    run.rate = 0.0
    assert run.go(45)[-1] == 0
    run.rate = 0.9
    assert max(run.go(400)) >= 4, "it is tried again"


def test_what_cannot_pay_is_tried_once() -> None:
    run = Run(MeasuredPace(16, 1), draft_s=99, step_s=100, rate=1.0)
    numbers = run.go(500)
    assert [number for number, _ in itertools.groupby(numbers)] == [0, 1, 0]
    assert run.seconds / (run.tokens - 1000) < 1.01 * 100
    assert max(run.go(700)) == 1, "and once more when the text is twice as long"


def test_the_numbers_are_few() -> None:
    run = Run(MeasuredPace(31, 1), draft_s=10, step_s=100, rate=0.8)
    numbers = run.go(400)[10:]
    changes = sum(a != b for a, b in itertools.pairwise(number for number in numbers if number))
    assert len(set(numbers)) <= 5
    assert changes < 15


def test_a_pass_is_faster_once_it_is_captured() -> None:
    """What launched passes take is forgotten before a trial ends."""
    run = Run(MeasuredPace(7, 3), draft_s=9, step_s=62, rate=0.8)
    run.go(5)
    run.step_s = 300
    run.go(3)
    run.step_s = 62
    assert run.go(3)[-1] > 0


class CapturedRun(Run):
    """An answer whose passes take four times as long until they were captured and compared."""

    def go(self, verifications: int) -> list[int]:
        numbers, captured_s = [], self.step_s
        seen: collections.Counter[int] = collections.Counter()
        for _ in range(verifications):
            drafts = self.pace.number(self.tokens)
            seen[drafts] += 1
            self.step_s = captured_s if seen[drafts] > 3 else 4 * captured_s
            numbers += super().go(1)
        return numbers


def test_a_number_is_kept_until_its_passes_are_captured() -> None:
    run = CapturedRun(MeasuredPace(15, 1), draft_s=9, step_s=60, rate=0.85)
    numbers = run.go(60)
    assert set(numbers[20:]) <= {3, 5, 7, 11, 15}
    assert numbers[20:] == [numbers[20]] * 40


def test_bad_drafts_cost_little() -> None:
    run = Run(MeasuredPace(16, 1), draft_s=10, step_s=100, rate=0.0)
    run.go(2000)
    assert run.seconds / (run.tokens - 1000) < 1.02 * 100


def test_a_slow_first_pass_is_forgotten() -> None:
    """It may have had to compile what it runs."""
    pace = MeasuredPace(16, 1)
    run = Run(pace, draft_s=1000, step_s=10000, rate=1.0)
    pace._plain_due = 0
    run.go(1)
    run.draft_s, run.step_s = 10, 100
    run.pace.note_pass(0, 100)
    assert run.go(12)[-1] > 4


def test_steps_are_timed_again_while_drafts_pay() -> None:
    numbers = Run(MeasuredPace(16, 1), draft_s=10, step_s=100, rate=0.9).go(300)
    assert 0 in numbers[100:]
    assert numbers[100:].count(0) < 5
