"""Strings that end an answer: where its text ends, in every way that it comes."""

import itertools
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AddedToken, StoppingCriteriaList

import headinfer
from headinfer.errors import OptionError
from headinfer.generation.stops import Stops
from headinfer.generation.text import TextCollector
from saved_models import WORDS, make_tokenizer
from tiny_models import VOCAB, tiny_model

PROMPT = " ".join(WORDS[number * 7 % 90] for number in range(40))


class Characters:
    """A tokenizer with a token for each character, of which one is special."""

    all_special_tokens = ("<end>",)

    def convert_tokens_to_ids(self, token: str) -> int:
        assert token == "<end>"
        return 1

    def decode(self, ids: list[int], **_settings: Any) -> str:
        return "".join(chr(token_id) for token_id in ids if token_id > 1)


def collected(text: str, stop: list[str], sizes: list[int]) -> tuple[TextCollector, list[str]]:
    """Collect a text that comes in steps of so many characters."""
    pieces: list[str] = []
    collector = TextCollector(Characters(), pieces.append, stops=Stops.of(stop, Characters()))
    rest = [ord(character) for character in text]
    for size in itertools.cycle(sizes):
        if not rest:
            break
        collector.add(rest[:size])
        rest = rest[size:]
    collector.end()
    collector.end()
    return collector, pieces


@given(
    text=st.text("ab<", max_size=12),
    stop=st.lists(st.text("ab<", min_size=1, max_size=4), max_size=3),
    sizes=st.lists(st.integers(1, 4), min_size=1, max_size=3),
)
def test_a_text_ends_before_what_is_complete_first(
    text: str, stop: list[str], sizes: list[int]
) -> None:
    expected = text
    for end in range(1, len(text) + 1):  # by the definition, character by character
        complete = [string for string in stop if text[:end].endswith(string)]
        if complete:
            expected = text[: end - len(max(complete, key=len))]
            break
    collector, pieces = collected(text, stop, sizes)
    assert "".join(pieces) == collector.text == expected
    assert collector.stopped is any(string in text for string in stop)


def test_only_what_may_begin_a_stop_is_held_back() -> None:
    pieces: list[str] = []
    stops = Stops.of(["<stop>"], Characters())
    collector = TextCollector(Characters(), pieces.append, stops=stops)
    for character in "a<st<b<stop>c":
        collector.add([ord(character)])
    assert pieces == ["a", "<st", "<b"]
    assert (collector.text, collector.stopped) == ("a<st<b", True)
    assert len(collector.ids) == len("a<st<b<stop>")


def test_a_special_token_ends_the_text_by_its_name() -> None:
    collector, pieces = collected("ab\x01cd", ["<end>", "bc"], [1])
    assert "".join(pieces) == "ab"
    assert collector.stopped
    assert collector.ids == [ord("a"), ord("b"), 1]


@pytest.mark.parametrize("token", ["</s>", "<turn>"])
def test_special_tokens_are_known_to_a_tokenizer(token: str) -> None:
    tokenizer = make_tokenizer()
    tokenizer.add_tokens([AddedToken("<turn>", special=True), AddedToken("<plain>")])
    stops = Stops.of([token, "<plain>", "w1"], tokenizer)
    assert stops.ids == {tokenizer.convert_tokens_to_ids(token)}
    assert stops.strings == ("<plain>", "w1")
    collector = TextCollector(tokenizer, lambda _piece: None, stops=stops)
    collector.add(tokenizer(f"w3 w4 {token} w5", add_special_tokens=False)["input_ids"])
    assert (collector.text.strip(), collector.stopped) == ("w3 w4", True)


def answer(stop: Any, **settings: Any) -> tuple[str, str | None, int]:
    model, tokenizer = tiny_model("llama3"), make_tokenizer(VOCAB)
    records = list(
        headinfer.generate(
            *(model, PROMPT),
            tokenizer=tokenizer,
            stop=stop,
            **{"device": "cpu", "max_new_tokens": 16} | settings,
        )
    )
    return "".join(part.text for part in records), records[-1].finish_reason, records[-1].tokens


WAYS: list[dict[str, Any]] = [{}, {"prompt_lookup_num_tokens": 5}]


@pytest.mark.parametrize("settings", WAYS, ids=["greedy", "lookup"])
def test_an_answer_ends_before_a_string_that_straddles_tokens(settings: dict[str, Any]) -> None:
    whole, reason, tokens = answer((), **settings)
    words = whole.split()
    assert (reason, tokens) == ("length", 16)
    stop = f"{words[5][-1]} {words[6]}"  # from within a token, over a space, to the next token
    text, reason, tokens = answer(["never", stop], **settings)
    assert text == whole[: whole.index(stop)]
    assert reason == "stop"
    assert 2 <= tokens <= 7


def test_beams_end_as_those_of_stock_transformers_do() -> None:
    """The stop is a token's whole text here, which a stock criterion can tell by its id."""
    whole, *_ = answer((), num_beams=3)
    stop = next(word for word in reversed(whole.split()) if len(word) == 3)
    tokenizer, model = make_tokenizer(VOCAB), tiny_model("llama3")
    stop_id = tokenizer.convert_tokens_to_ids(stop)
    rows = model.generate(
        **tokenizer(PROMPT, return_tensors="pt"),
        num_beams=3,
        max_new_tokens=16,
        stopping_criteria=StoppingCriteriaList([lambda ids, _scores: ids[:, -1] == stop_id]),
    )
    expected = tokenizer.decode(rows[0, len(PROMPT.split()) :], skip_special_tokens=True)
    text, reason, _ = answer(stop, num_beams=3)
    assert (text, reason) == (expected[: expected.index(stop)], "stop")


def test_strings_of_the_prompt_end_nothing() -> None:
    whole, *_ = answer(None)
    stop = next(word for word in PROMPT.split() if word not in whole)
    assert answer(stop) == (whole, "length", 16)


@pytest.mark.parametrize("stop", ["", ["w1", ""], [3], 3])
def test_what_is_no_string_to_stop_at_is_refused_at_once(stop: Any) -> None:
    with pytest.raises(OptionError, match="to stop at must be some text, not"):
        headinfer.generate("nowhere", "hello", stop=stop)
