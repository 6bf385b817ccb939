"""Tests whose cases are many: a selection by default, all of them where slow ones run."""

from collections import Counter, defaultdict
from collections.abc import Hashable, Sequence

import pytest


def _entries(item: pytest.Item, names: Sequence[str]) -> list[Hashable]:
    """What a case has of each list of parameters; with names, of each of these parameters."""
    groups: list[tuple[str, ...]] = []
    for mark in () if names else item.iter_markers("parametrize"):
        asked = mark.args[0]
        asked = asked.split(",") if isinstance(asked, str) else asked
        groups.append(tuple(name.strip() for name in asked))
    for name in names or item.callspec.params:
        if not any(name in group for group in groups):
            groups.append((name,))
    values = item.callspec.params
    return [(group, tuple(_known(values[name]) for name in group)) for group in groups]


def _known(value: object) -> Hashable:
    """Give a value beside its type: True is not 1 here."""
    try:
        hash(value)
    except TypeError:
        return type(value), repr(value)
    return type(value), value


def selection(cases: Sequence[Sequence[Hashable]], most: int | None = None) -> set[int]:
    """Give which cases have every value among them; each is the one with most that is new.

    Between cases with as much that is new the values decide that were chosen least often: values of
    a short list go round beside those of a long one. With `most`, there are no more than that.
    """
    wanted = {value for case in cases for value in case}
    seen: Counter[Hashable] = Counter()
    chosen: set[int] = set()
    while wanted - seen.keys() and len(chosen) != most:
        best = min(
            set(range(len(cases))) - chosen,
            key=lambda at: (
                -sum(value not in seen for value in cases[at]),
                sum(seen[value] for value in cases[at]),
                at,
            ),
        )
        chosen.add(best)
        seen.update(cases[best])
    return chosen


def thin(items: Sequence[pytest.Item]) -> None:
    """Mark as slow what is left of tests with the marker `covering`.

    Each entry of each list of parameters is in a case that is kept. A marker with names means the
    values of these parameters alone, each by itself. With `most`, there are no more cases than
    that: where each takes many seconds, and other tests have what the rest would show in part.
    """
    tests: defaultdict[str, list[pytest.Item]] = defaultdict(list)
    for item in items:
        if item.get_closest_marker("covering") and not item.get_closest_marker("slow"):
            tests[item.nodeid.partition("[")[0]].append(item)
    for cases in tests.values():
        marker = cases[0].get_closest_marker("covering")
        kept = selection([_entries(case, marker.args) for case in cases], **marker.kwargs)
        for at, case in enumerate(cases):
            if at not in kept:
                case.add_marker(pytest.mark.slow)
