"""Answers held against stock's."""

import json

import pytest
from answers_parts import record

from headinfer.evaluate.answers.record import Likeness, Record, likeness


def test_answers_with_the_same_tokens_are_the_same_in_any_order():
    stock = [record("a"), record("b", (7, 8))]
    assert likeness(stock, stock[::-1]) == Likeness(compared=2, same=2, tied=0)


@pytest.mark.parametrize(
    ("method", "ties", "tied"),
    [
        ((5, 9), (False, True), 1),
        ((5, 9), (True, False), 0),
        ((9, 6), (False, True), 0),
        ((9, 6), (True, True), 1),
        ((5,), (True, True), 0),
        ((5, 6, 7), (True, True), 0),
    ],
)
def test_a_difference_is_a_tie_where_stocks_two_best_are_tied_at_the_first_one(method, ties, tied):
    found = likeness([record("a", ties=ties)], [record("a", method)])
    assert found == Likeness(compared=1, same=0, tied=tied)
    assert found.differing == 1 - tied


def test_what_either_did_not_see_whole_is_not_compared():
    stock = [record("a"), record("b", cut=3), record("c")]
    method = [record("a", (9, 9), cut=1), record("b"), record("d")]
    assert likeness(stock, method).compared == 0
    assert likeness(stock, [record("c")]).same == 1


def test_a_record_goes_through_json():
    one = Record(
        question="depth 0.5",
        expected=("12345", "other"),
        score=0.25,
        answer=record("x", ties=(True, False), cut=7).answer,
        labels={"depth": 0.5, "kind": "one"},
        measures={"saved_s": 1.5},
    )
    assert Record.from_json(json.loads(json.dumps(one.to_json()))) == one
