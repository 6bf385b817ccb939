"""What runs by default of tests whose cases are many."""

from itertools import product
from types import SimpleNamespace

import pytest

from covering import selection, thin

CASES = list(product("abcde", [1, 2], [True, False]))


def test_every_entry_is_chosen_in_as_few_cases_as_the_longest_list_has() -> None:
    chosen = [CASES[at] for at in selection(CASES)]
    assert len(chosen) == 5
    for place, wanted in enumerate(("abcde", [1, 2], [True, False])):
        assert {case[place] for case in chosen} == set(wanted)


def test_short_lists_go_round_beside_a_long_one() -> None:
    chosen = [CASES[at] for at in selection(CASES)]
    assert min(sum(case[1] == each for case in chosen) for each in (1, 2)) == 2


def test_no_more_are_chosen_than_asked_for() -> None:
    assert selection(CASES, most=2) < selection(CASES)
    assert len(selection(CASES, most=2)) == 2


class Case:
    """A test's case as pytest collects it, in as far as is looked at."""

    nodeid = "tests/test_it.py::test_it[case]"

    def __init__(self, marker: pytest.MarkDecorator, **values: object) -> None:
        self.callspec = SimpleNamespace(params=values)
        self.markers = [
            pytest.mark.parametrize(("first", "third"), []).mark,
            pytest.mark.parametrize("second", []).mark,
            marker.mark,
        ]

    def iter_markers(self, name: str) -> list[pytest.Mark]:
        return [mark for mark in self.markers if mark.name == name]

    def get_closest_marker(self, name: str) -> pytest.Mark | None:
        return next(iter(self.iter_markers(name)), None)

    def add_marker(self, marker: pytest.MarkDecorator) -> None:
        self.markers.append(marker.mark)


def kept(marker: pytest.MarkDecorator) -> list[dict[str, object]]:
    entries = product([(0, 0), (0, 1), (1, 1), (1, 0)], [1, True, [1]])
    cases = [Case(marker, first=a, third=b, second=second) for (a, b), second in entries]
    thin(cases)
    return [case.callspec.params for case in cases if not case.get_closest_marker("slow")]


def test_parameters_that_are_listed_together_are_one_entry() -> None:
    cases = kept(pytest.mark.covering)
    assert len({(each["first"], each["third"]) for each in cases}) == len(cases) == 4
    assert {type(each["second"]) for each in cases} == {int, bool, list}


def test_named_parameters_are_each_by_itself() -> None:
    assert kept(pytest.mark.covering("first", "third")) == [
        {"first": 0, "third": 0, "second": 1},
        {"first": 1, "third": 1, "second": 1},
    ]


def test_what_has_no_marker_runs_whole() -> None:
    assert len(kept(pytest.mark.gpu)) == 12
