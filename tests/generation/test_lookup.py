"""Drafts that a text gives itself: what followed where its newest tokens stood last."""

import pytest
import torch
from transformers import LogitsProcessorList

from headinfer.generation.acceptance import Choice
from headinfer.generation.candidates import Lookup
from tiny_models import random_tokens

CHOICE = Choice(processors=LogitsProcessorList(), samples=False)


def looked_up(text: list[int], most: int, ngram_tokens: int) -> list[int]:
    """What a plain search finds: the longest of the newest tokens first, the newest place first."""
    for size in range(min(ngram_tokens, len(text) - 1), 0, -1):
        for start in range(len(text) - 1, size - 1, -1):
            if text[start - size : start] == text[-size:]:
                seen = [*text]
                for place in range(start, start + most):
                    seen.append(seen[place])
                return seen[len(text) :]
    return []


@pytest.mark.parametrize("ngram_tokens", [1, 2, 3, 5])
def test_what_followed_the_newest_of_the_longest_matches_is_drafted(ngram_tokens: int) -> None:
    lookup, found = Lookup(ngram_tokens), 0
    for tokens in range(1, 120):
        ids = random_tokens(1, tokens, seed=tokens) % (2 + tokens % 11)
        for most in (1, 4, 31):
            drafted = lookup.draft(ids, most, CHOICE)
            assert drafted == looked_up(ids[0].tolist(), most, ngram_tokens)
            found += bool(drafted)
    assert found > 200


def test_the_newest_place_says_what_follows() -> None:
    text = torch.tensor([[1, 2, 3, 7, 7, 1, 2, 3, 8, 9, 2, 3]])
    assert Lookup(2).draft(text, 3, CHOICE) == [8, 9, 2]
    assert Lookup(2).draft(text[:, :3], 3, CHOICE) == []


def test_a_text_that_repeats_itself_is_drafted_beyond_its_end() -> None:
    assert Lookup(3).draft(torch.tensor([[5, 6, 4, 6, 4]]), 5, CHOICE) == [6, 4, 6, 4, 6]
