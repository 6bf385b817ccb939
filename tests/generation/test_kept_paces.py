"""What one answer measured of drafts is where another one of the same attachment begins."""

import itertools
from collections import Counter
from typing import Any

import pytest
import torch
from timed_drafts import Clock, TimedAnswers

import headinfer
from headinfer.generation import candidates
from headinfer.generation.kept_paces import KeptPaces
from headinfer.generation.measured_pace import MeasuredPace
from saved_models import make_tokenizer
from tiny_models import VOCAB, random_tokens, tiny_model

SIMULATED: dict[str, Any] = {
    "device": "simulated",
    "chunk_tokens": 512,
    "tile_heads": 1,
    "tile_tokens": 256,
}
ALWAYS = [True] * 200


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def in_any_case(_tokens: int) -> float:
    return 0.2


def test_an_answer_begins_with_the_number_that_the_last_one_ended_with(clock: Clock) -> None:
    answers = TimedAnswers(clock, ALWAYS, in_any_case, 0.01)
    with headinfer.attach(answers.model, **SIMULATED):
        first = answers.drafted(80)
        assert (first[:6], first[-1]) == ([0] * 5 + [1], 15)
        assert set(answers.drafted(80)) == {15}


def test_an_attachment_begins_with_nothing(clock: Clock) -> None:
    answers = TimedAnswers(clock, ALWAYS, in_any_case, 0.01)
    for _ in range(2):
        with headinfer.attach(answers.model, **SIMULATED):
            assert answers.drafted(60)[:5] == [0] * 5


@pytest.mark.slow
def test_times_of_another_context_are_not_believed(clock: Clock) -> None:
    """Nor forgotten: both are kept, each for contexts about as long."""
    answers = TimedAnswers(clock, ALWAYS, in_any_case, 0.01)
    longer, longest = (random_tokens(1, count)[0].tolist() for count in (900, 1300))
    with headinfer.attach(answers.model, **SIMULATED):
        answers.drafted(80)
        assert answers.drafted(40, longer)[0] == 15, "a thousand tokens are about as many"
        assert answers.drafted(80, longest)[:6] == [0] * 5 + [1]
        assert answers.drafted(40, longest)[0] == 15
        assert answers.drafted(40)[0] == 15


@pytest.mark.slow
def test_another_assistants_times_are_not_believed(clock: Clock) -> None:
    answers = TimedAnswers(clock, ALWAYS, in_any_case, 0.01)
    other = tiny_model("llama3")
    with headinfer.attach(answers.model, **SIMULATED):
        answers.drafted(60)
        assert answers.drafted(60, assistant=other)[:5] == [0] * 5
        assert answers.drafted(40)[0] == 15


@pytest.mark.slow
def test_launched_passes_of_a_new_cache_are_left_out(clock: Clock) -> None:
    """As long as those that are captured in time: the first three of each number in an answer."""
    answers = TimedAnswers(clock, ALWAYS, in_any_case, 0.01)
    seen: Counter[int] = Counter()

    def launched_at_first(tokens: int) -> float:
        seen[tokens] += 1
        return 0.2 if seen[tokens] > 3 else 2.0

    with headinfer.attach(answers.model, **SIMULATED):
        answers.drafted(110)
        answers.pass_s = launched_at_first
        assert set(answers.drafted(120)) == {15}


@pytest.mark.slow
def test_an_answer_whose_passes_take_longer_adapts(clock: Clock) -> None:
    """The CPU may be at something else now."""
    answers = TimedAnswers(clock, ALWAYS, in_any_case, 0.01)
    with headinfer.attach(answers.model, **SIMULATED):
        answers.drafted(110)
        answers.pass_s = lambda tokens: 0.2 + 0.2 * max(tokens - 8, 0)
        numbers = answers.drafted(120)
    assert numbers[:5] == [15] * 5, "three of which may be launched"
    assert max(numbers[5:]) < 15


def test_an_answer_whose_drafts_are_wrong_adapts(clock: Clock) -> None:
    answers = TimedAnswers(clock, ALWAYS, in_any_case, 0.05)
    with headinfer.attach(answers.model, **SIMULATED):
        answers.drafted(140)
        answers.right = [False] * 200
        numbers = answers.drafted(60)
        assert numbers[0] == 15
        fallen = numbers.index(0)
        assert fallen <= 25
        assert set(numbers[fallen:]) <= {0, 1}
        assert sum(answers.drafted(20)) <= 5, "a pause goes on"
        answers.right = ALWAYS
        assert max(answers.drafted(90)) > 1, "and ends"


@pytest.mark.slow
def test_what_cannot_pay_is_tried_seldom(clock: Clock) -> None:
    """The text is not twice as long in any of them."""
    answers = TimedAnswers(clock, ALWAYS, in_any_case, 0.3)
    prompt = random_tokens(1, 300)[0].tolist()
    with headinfer.attach(answers.model, **SIMULATED):
        assert Counter(answers.drafted(30, prompt))[1] == 5
        assert [sum(answers.drafted(30, prompt)) for _ in range(3)] == [0] * 3


def test_answers_too_short_to_judge_leave_nothing(clock: Clock) -> None:
    answers = TimedAnswers(clock, ALWAYS, in_any_case, 0.01)
    with headinfer.attach(answers.model, **SIMULATED):
        assert answers.drafted(4) == [0, 0]
        assert answers.drafted(60)[:6] == [0] * 5 + [1]


@pytest.mark.slow
def test_a_seed_gives_its_text_at_any_pace(clock: Clock) -> None:
    """The same random number draws a token, however many were drafted with it."""
    answers = TimedAnswers(clock, ALWAYS, in_any_case, 0.01)
    sampled: dict[str, Any] = {"temperature": 1.5, "seed": 5}
    with headinfer.attach(answers.model, **SIMULATED):  # `drafted` compares with a text without
        numbers = [answers.drafted(60, **sampled) for _ in range(2)]
    assert numbers[0] != numbers[1]
    assert numbers[1][0] > 1


@pytest.mark.slow
def test_a_models_own_drafts_go_on(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = tiny_model("llama3"), random_tokens(1, 9).repeat(1, 40)[0].tolist()
    last_logits, drafts, passes = candidates.last_logits, [0], []

    def note(_layer: Any, given: tuple[torch.Tensor], _output: Any) -> None:
        clock.now_s += 0.001 if drafts[0] else 0.01
        if not drafts[0]:
            passes.append(given[0].shape[1])

    def draft(*given: Any) -> Any:
        drafts[0] += 1
        try:
            return last_logits(*given)
        finally:
            drafts[0] -= 1

    monkeypatch.setattr(candidates, "last_logits", draft)
    with headinfer.attach(model, **SIMULATED, draft_tokens=64):
        model.get_input_embeddings().register_forward_hook(note)
        settings: dict[str, Any] = {"tokenizer": make_tokenizer(VOCAB), "max_new_tokens": 60}
        texts, lengths = [], []
        for _ in range(2):
            passes.clear()
            texts.append([record.text for record in headinfer.generate(model, ids, **settings)])
            lengths.append(passes[1:])
    assert lengths[0][:5] == [1] * 5, "some steps are timed first"
    assert lengths[1][0] > 1
    assert "".join(texts[0]) == "".join(texts[1])


def test_paces_that_are_kept_are_few() -> None:
    paces = KeptPaces()
    lengths = [2000 * 2**doubled for doubled in range(20)]
    for tokens in lengths:
        measured(paces.begin("lookup", 7, 7, tokens), tokens)
    assert [tokens for tokens in lengths if knows(paces, tokens)] == lengths[-16:]


def measured(pace: MeasuredPace, tokens: int) -> None:
    """Have an answer end once all times are known."""
    for _ in range(14):
        drafts = pace.number(tokens)
        pace.note_draft(drafts, 0.01 * drafts)
        pace.note_pass(drafts, 0.2)
        if drafts:
            pace.note_accepted(drafts, rejected=False)
    pace.end()


def knows(paces: KeptPaces, tokens: int) -> bool:
    return paces.begin("lookup", 7, 7, tokens).number(tokens) > 0


def test_a_pace_of_other_drafts_is_another_one() -> None:
    paces = KeptPaces()
    measured(paces.begin("lookup", 7, 7, 2000), 2000)
    assert paces.begin("lookup", 7, 7, 2100).number(2100) == 7
    assert paces.begin("lookup", 15, 7, 2100).number(2100) == 0
    assert paces.begin("itself", 7, 7, 2100).number(2100) == 0


def test_steps_are_timed_again_through_answers() -> None:
    """Three of a new cache are left out, so that they come after four times as many."""
    pace = MeasuredPace(15, 1)
    numbers: list[int] = []
    for _ in range(12):
        numbers += answer_of(pace, 60)
        pace = pace.another(1000)
    plain = [len(list(group)) for number, group in itertools.groupby(numbers) if number == 0]
    assert plain == [5, 4, 4]


def answer_of(pace: MeasuredPace, passes: int) -> list[int]:
    numbers = []
    for _ in range(passes):
        drafts = pace.number(1000)
        numbers.append(drafts)
        pace.note_draft(drafts, 0.01 * drafts)
        pace.note_pass(drafts, 0.2)
        if drafts:
            pace.note_accepted(drafts, rejected=False)
    return numbers
