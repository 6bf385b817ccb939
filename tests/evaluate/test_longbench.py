"""LongBench v2: the official prompt, extraction and scores, on made-up files in its format."""

import json

import pytest
from benchmark_parts import Said, letters_tokenizer

from headinfer.errors import OptionError
from headinfer.evaluate.answers.answering import cut_middle
from headinfer.evaluate.answers.task import task_from_json
from headinfer.evaluate.longbench.task import BEGUN, LongBenchV2, extracted, filled

EXAMPLE = {
    "_id": "66f36490821e116aacb2cc22",
    "domain": "Single-Document QA",
    "sub_domain": "Financial",
    "difficulty": "easy",
    "length": "short",
    "question": " Who owns {the} fund? ",
    "choice_A": "One\n",
    "choice_B": "Two",
    "choice_C": "Three",
    "choice_D": "Four",
    "answer": "B",
    "context": "  The fund $Q$ is owned by two.\n",
}


def example(number: int, **changes) -> dict:
    return EXAMPLE | {"_id": f"id{number}"} | changes


def written(path, examples, *, lines=False) -> str:
    text = "\n".join(map(json.dumps, examples)) if lines else json.dumps(examples)
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_the_prompt_is_the_official_one():
    assert filled(EXAMPLE) == (
        "Please read the following text and answer the question below.\n\n<text>\nThe fund $Q$ is "
        "owned by two.\n</text>\n\nWhat is the correct answer to this question: Who owns {the} "
        "fund?\nChoices:\n(A) One\n(B) Two\n(C) Three\n(D) Four\n\nFormat your response as "
        'follows: "The correct answer is (insert answer here)".'
    )


@pytest.mark.parametrize(
    ("response", "letter"),
    [
        ("The correct answer is (B).", "B"),
        ("The correct answer is C", "C"),
        ("**The correct answer is (D)**", "D"),
        ("The *correct* answer is (A) One", "A"),
        ("The correct answer is A. No: The correct answer is (B)", "B"),
        ("The correct answer is (insert answer here)", None),
        ("the correct answer is (B)", None),
        ("The correct answer is (E)", None),
        ("(B)", None),
        ("", None),
    ],
)
def test_the_letter_is_extracted_as_the_official_script_does(response, letter):
    assert extracted(response) == letter


@pytest.mark.parametrize("lines", [False, True])
def test_questions_of_a_file_are_scored_by_group(tmp_path, lines):
    groups = [("easy", "short"), ("easy", "medium"), ("hard", "short"), ("hard", "long")]
    examples = [
        example(number, difficulty=difficulty, length=length)
        for number, (difficulty, length) in enumerate(groups)
    ]
    task = LongBenchV2(data=written(tmp_path / "data.json", examples, lines=lines), samples=9)
    assert task.questions(4096) == 4
    said = Said(["The correct answer is (B)", "(B)", "The correct answer is (B)", "no"])
    records = list(task.records(4096, said, ()))
    assert [record.score for record in records] == [1, 0, 1, 0]
    assert [record.expected for record in records] == [("B",)] * 4
    assert len({record.question for record in records}) == 4
    assert task.scores(records) == {
        "overall": 0.5,
        "easy": 0.5,
        "hard": 0.5,
        "short": 1.0,
        "medium": 0.0,
        "long": 0.0,
    }
    assert task.scores(records[:1])["hard"] is None
    assert said.most == [128] * 4


def test_a_prompt_is_cut_in_the_middle_to_the_context(tmp_path):
    long = example(0, context="a" * 5000)
    task = LongBenchV2(data=written(tmp_path / "data.json", [long]), raw=True)
    said = Said(["The correct answer is (B)"])
    (record,) = task.records(600, said, ())
    whole = letters_tokenizer()(filled(long))["input_ids"]
    assert said.prompts == [cut_middle(whole, 600)]
    assert record.measures["whole_tokens"] == len(whole)


def test_a_chat_template_goes_around_the_prompt_and_the_answer_can_be_begun(tmp_path):
    task = LongBenchV2(data=written(tmp_path / "data.json", [EXAMPLE]), begun=True)
    said = Said(["B) Two"])
    (record,) = task.records(4096, said, ())
    assert said.texts() == [f"<user> {filled(EXAMPLE)} <assistant>{BEGUN}"]
    assert record.score == 1


def test_fewer_samples_are_some_of_the_same_and_what_is_done_is_left_out(tmp_path):
    data = written(tmp_path / "data.json", [example(number) for number in range(8)])

    def names(samples, done=()):
        task = LongBenchV2(data=data, samples=samples, seed=3)
        return [record.question for record in task.records(4096, Said([""] * samples), done)]

    three, five = names(3), names(5)
    assert set(three) < set(five)
    assert five == sorted(five)
    assert names(5, done=three) == [name for name in five if name not in three]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[", "neither a JSON list nor"),
        ("[]", "no examples"),
        ('[{"_id": 1}]', "example 0 has no difficulty"),
        ("3\n", "example 0 has no _id"),
    ],
)
def test_a_file_that_is_no_such_data_is_refused(tmp_path, text, message):
    path = tmp_path / "data.json"
    path.write_text(text)
    with pytest.raises(OptionError, match=message):
        LongBenchV2(data=str(path)).questions(1)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(OptionError, match="cannot be read: No such file"):
        LongBenchV2(data=str(tmp_path / "none.json")).questions(1)


def test_made_questions_are_the_same_every_time_and_fit(tmp_path):
    prose = tmp_path / "prose.txt"
    prose.write_text("It was a day. " * 400)
    task = LongBenchV2(data="made", samples=4, seed=1, text=str(prose))

    def made(again):
        said = Said(["The correct answer is (A)"] * 4)
        return said, list(again.records(2000, said, ()))

    said, records = made(task)
    assert made(task_from_json(task.to_json()))[0].texts() == said.texts()
    assert [record.labels["difficulty"] for record in records] == [*["easy"] * 3, "hard"]
    assert all(1800 < len(prompt) <= 2000 for prompt in said.prompts)
    assert all(record.measures["whole_tokens"] <= 2000 for record in records)
    for text, record in zip(said.texts(), records, strict=True):
        prose_read, choices = text.split("Choices:\n")
        right = choices.split(f"({record.expected[0]}) ")[1].split("\n")[0]
        assert prose_read.count(right) == 1
    assert any("MADE-UP" in line for line in task.told())


def test_made_questions_that_do_not_fit_are_refused(tmp_path):
    prose = tmp_path / "prose.txt"
    prose.write_text("It was a day.")
    task = LongBenchV2(data="made", text=str(prose))
    with pytest.raises(OptionError, match="too short for the facts"):
        list(task.records(100, Said([""]), ()))
