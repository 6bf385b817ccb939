"""How many tokens `draft="auto"` drafts, where a clock of the test's own says what passes take."""

import bisect
import itertools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.cache_utils import Cache

import headinfer
from headinfer.integration.calls import CACHE_NAMES
from saved_models import make_tokenizer
from tiny_models import VOCAB, random_tokens, tiny_model

RECORD = Path(__file__).parents[2] / "benchmarks/results/drafts-acceptance.json"
PROMPT = random_tokens(1, 40)[0].tolist()
TOKENIZER = make_tokenizer(VOCAB)


class Clock:
    """A clock that stands still but where a model runs."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(time, "perf_counter", clock)
    return clock


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


def held(keywords: dict[str, Any]) -> int:
    """Return how many tokens the cache among a call's arguments has."""
    cache: Cache = next(keywords[name] for name in CACHE_NAMES if name in keywords)
    return cache.get_seq_length()


def drafted(
    clock: Clock, right: list[bool], pass_s: Callable[[int], float], draft_s: float, tokens: int
) -> list[int]:
    """Return how many tokens were drafted for each pass of an answer.

    Args:
        clock: tells the time.
        right: whether the assistant's next draft is, for each token of the answer.
        pass_s: of a pass of so many tokens.
        draft_s: of one draft.
        tokens: of the answer.
    """
    model, assistant = tiny_model("llama3"), tiny_model("llama3")
    assistant.load_state_dict(model.state_dict())
    settings: dict[str, Any] = {"tokenizer": TOKENIZER, "max_new_tokens": tokens}
    plain = [record.text for record in headinfer.generate(model, PROMPT, **settings)]
    numbers: list[int] = []

    def passes(_layer: Any, given: tuple[torch.Tensor], _output: Any) -> None:
        numbers.append(given[0].shape[1] - 1)
        clock.now_s += pass_s(given[0].shape[1])

    def drafts(_model: Any, _given: Any, keywords: dict[str, Any], output: Any) -> Any:
        clock.now_s += draft_s
        answered = held(keywords) - len(PROMPT)
        if answered >= 0 and not right[answered]:
            output.logits = -output.logits
        return output

    model.get_input_embeddings().register_forward_hook(passes)
    assistant.register_forward_hook(drafts, with_kwargs=True)
    records = list(headinfer.generate(model, PROMPT, assistant=assistant, **settings))
    assert "".join(record.text for record in records) == "".join(plain)
    last = records[-1]
    assert last.drafted_tokens == sum(numbers[1:])
    assert last.verifications == sum(number > 0 for number in numbers[1:])
    return numbers[1:-1]  # without the prompt, and the end, where fewer are left


def in_any_case(_tokens: int) -> float:
    return 0.2


def launched(tokens: int) -> float:
    """Seconds of a pass where that of one token is captured, and others are not."""
    return 0.06 if tokens == 1 else 0.12


def slow_beyond_eight(tokens: int) -> float:
    return 0.1 + 0.03 * max(tokens - 8, 0)


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
