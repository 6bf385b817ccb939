"""SCBench: official prompts and scores, on made-up files in its format."""

import json

import pytest
from answers_parts import answering
from benchmark_parts import Letters

from headinfer.errors import OptionError
from headinfer.evaluate.answers.record import Record
from headinfer.evaluate.answers.task import task_from_json
from headinfer.evaluate.prompts.chat import first_text
from headinfer.evaluate.scbench import data as scbench_data
from headinfer.evaluate.scbench.data import found_tasks
from headinfer.evaluate.scbench.functions import Function, names_function
from headinfer.evaluate.scbench.prompts import FORMS, new_tokens, of_requests, of_turns
from headinfer.evaluate.scbench.scores import expected, score
from headinfer.evaluate.scbench.task import Mode, SCBench
from tiny_models import shared_model

PLAIN, CHAT = Letters(chat_template=None), Letters()


def turn(question: str, answer, **more) -> dict:
    return {"input": question, "answer": answer} | more


def example(*turns: dict, context="The book.", **more) -> dict:
    return {"id": 0, "context": context, "multi_turns": list(turns)} | more


TWO = example(turn("One?", "yes"), turn("Two?", "no"))
CHOICES = example(
    turn("Who?", "Ann", options=["Bob", "Ann", "Cy", "Di"]),
    turn("Why?", "Rain", options=["Rain", "Sun", "Snow", "Hail"]),
)
NUMBERS = example(turn("The median is", 7), turn("The largest number is", 9), context=[5, 7, 9])


def test_turns_follow_the_right_answer_before_them():
    head = "Extract the value corresponding to the specified key in the JSON object below.\n\n"
    assert of_turns("scbench_kv", TWO, PLAIN, raw=False) == [
        f"{head}The book.\n\nOne?",
        "yes\n\nTwo?",
    ]
    assert of_turns("scbench_kv", TWO, CHAT, raw=False) == [
        f"<user> {head}The book.\n\nOne? <assistant>",
        " yes <user> Two? <assistant>",
    ]
    assert of_turns("scbench_kv", TWO, CHAT, raw=True) == [
        f"{head}The book.\n\nOne?",
        "yes\n\nTwo?",
    ]


def test_requests_follow_the_context_alone():
    head = "Read the book and answer the question. Be very concise in your answer.\n\n"
    assert of_requests("scbench_qa_eng", TWO, PLAIN, raw=False) == [
        f"{head}The book.",
        "Question: One?\nAnswer:",
        "Question: Two?\nAnswer:",
    ]
    assert of_requests("scbench_qa_eng", TWO, CHAT, raw=False) == [
        f"<user> {head}The book.",
        "Question: One?\nAnswer: <assistant>",
        "Question: Two?\nAnswer: <assistant>",
    ]


def test_choices_are_asked_in_the_official_words():
    first, second = of_turns("scbench_choice_eng", CHOICES, PLAIN, raw=True)
    assert first == (
        "Read the book and answer the question.\n\nThe book.\n\nQuestion: Who?\nA. Bob\nB. Ann\n"
        "C. Cy\nD. Di\n\nThe the correct answer is"
    )
    assert second == (
        "Ann\n\nQuestion: Why?\nA. Rain\nB. Sun\nC. Snow\nD. Hail\n\n"
        "The letter of the correct answer is"
    )
    assert of_turns("scbench_choice_eng", CHOICES, CHAT, raw=False)[1].endswith(
        "D. Hail\n\nThe the correct answer is <assistant>"
    )


def test_numbers_are_asked_for_twice():
    assert of_turns("scbench_mf", NUMBERS, PLAIN, raw=True) == [
        "What is the median?\n\n[5, 7, 9]\n\nThe median is",
        "7\n\nWhat is the largest number?\n\nThe largest number is",
    ]
    assert of_requests("scbench_mf", NUMBERS, PLAIN, raw=True) == [
        "The median is\n\n[5, 7, 9]",
        "What is the median?\n\nThe median is",
        "What is the largest number?\n\nThe largest number is",
    ]


def test_later_summaries_of_a_chat_are_begun():
    assert of_turns("scbench_summary", TWO, CHAT, raw=False)[1].endswith(
        "Two? <assistant>This paper"
    )
    assert of_turns("scbench_summary", TWO, CHAT, raw=True)[1] == "yes\n\nTwo?"


def test_a_template_that_changes_earlier_turns_is_refused():
    class Forgetful(Letters):
        def apply_chat_template(self, messages, **settings):
            return super().apply_chat_template(messages[-1:], **settings)

    with pytest.raises(OptionError, match="chat template changes earlier turns"):
        of_turns("scbench_kv", TWO, Forgetful(), raw=False)


class Jinja(Letters):
    """A tokenizer whose chat template is one of Jinja's, as transformers renders it."""

    def apply_chat_template(self, messages, *, add_generation_prompt, **_settings):
        import jinja2

        return jinja2.Template(self.chat_template).render(
            messages=messages, add_generation_prompt=add_generation_prompt
        )


TRIMMING = (
    "{% for each in messages %}<{{ each.role }}> {{ each.content | trim }} {% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def test_a_template_that_trims_keeps_what_is_said():
    tokenizer = Jinja(chat_template=TRIMMING)
    assert first_text(tokenizer, "One?", raw=False) == "<user> One? <assistant>"
    assert of_requests("scbench_vt", TWO, tokenizer, raw=False) == [
        "<user> The book.",
        "One? <assistant>",
        "Two? <assistant>",
    ]
    assert of_turns("scbench_vt", TWO, tokenizer, raw=False)[1].endswith(
        "yes <user> Two? <assistant>"
    )


def test_a_template_that_changes_what_is_said_is_refused():
    tokenizer = Jinja(chat_template="{{ messages[0].content | length }}")
    for ask in (of_turns, of_requests):
        with pytest.raises(OptionError, match="changes what is said; leave it out with --raw"):
            ask("scbench_vt", TWO, tokenizer, raw=False)


def test_each_kind_of_turn_has_its_own_length():
    assert new_tokens("scbench_mf", turn("", 1)) == 5
    assert new_tokens("scbench_repoqa_and_kv", turn("", "", task="scbench_kv")) == 80
    assert new_tokens("scbench_repoqa_and_kv", turn("", "", task="scbench_repoqa")) == 1024


@pytest.mark.parametrize(
    ("task", "response", "right", "points"),
    [
        ("scbench_kv", "It is ab-1.", "ab-1", 1),
        ("scbench_kv", "AB-1", "ab-1", 0),
        ("scbench_prefix_suffix", "xyzzy", "yzz", 1),
        ("scbench_qa_eng", "It was ANN who", "Ann", 1),
        ("scbench_qa_eng", "An", "Ann", 0),
        ("scbench_many_shot", "so (b)", "(B)", 1),
        ("scbench_many_shot", "so (a)", "(B)", 0),
        ("scbench_vt", "ab and CD", ["AB", "CD", "EF"], 0.67),
        ("scbench_vt", "", ["AB"], 0),
        ("scbench_passkey", "The key 12 or 13", "12", 1),
        ("scbench_passkey", "none", "12", 0),
        ("scbench_mf", "about 7.9, or 8", 7, 1),
        ("scbench_mf", "8, not 7", 7, 0),
        ("scbench_mf", "7.50", 7.5, 1),
        ("scbench_mf", "none", 0, 0),
        # Three letters in common of three and four: 2 x 3 / 7.
        ("scbench_qa_chn", "北京市。大", "北京市", 6 / 7),
        ("scbench_qa_chn", "上海", "北京", 0),
    ],
)
def test_scores_by_hand(task, response, right, points):
    given = turn("", right)
    assert score(task, response, given, example(given), ()) == pytest.approx(points)


@pytest.mark.parametrize(
    ("response", "points"),
    [
        ("A. Rain", 1),
        ("B", 0),
        ("Rain", 1),
        ("All rain", 1),  # its first letter is taken for the choice
        ("I think the answer is: A", 1),
        ("I think the answer is: C", 0),
        ("the answer is", 0),
        ("so 'Rain', option is A", 1),
        ("it must be A, or B", 1),
        ("it must be C, or A", 0),
        ("no idea", 0),
        ("  ", 0),
    ],
)
def test_choices_are_read_as_the_official_script_does(response, points):
    given = CHOICES["multi_turns"][1]
    assert expected("scbench_choice_eng", given) == ("Rain", "A")
    assert score("scbench_choice_eng", response, given, CHOICES, ()) == points


def test_summaries_are_scored_by_rouge():
    pytest.importorskip("rouge_score")
    given = turn("", "the cat sat\non the mat")
    # Lines in common: "the cat" and "the mat", 4 of 6 words of each.
    points = score("scbench_summary", "the cat ran\nin the mat", given, example(given), ())
    assert points == pytest.approx(4 / 6)


def test_functions_are_told_from_the_others_of_their_repository():
    pytest.importorskip("nltk")
    pytest.importorskip("tree_sitter_language_pack")
    one = "def one(a, b):\n    total = a + b\n    return total"
    two = "def two(a, b):\n    total = a - b\n    return total + 1"
    functions = [Function("one", one), Function("two", two)]
    said = f"Here:\n```python\nimport os\n\n{one}\n```\n"
    assert names_function(said, "one", functions, "python")
    assert not names_function(said, "two", functions, "python")
    assert not names_function("def one(): pass", "one", functions, "python")


def test_code_of_any_depth_is_gone_through():
    pytest.importorskip("nltk")
    pytest.importorskip("tree_sitter_language_pack")
    deep = "x = " + "(" * 3000 + "1" + ")" * 3000
    one = "def one(a):\n    return a + 1 - 2"
    functions = [Function("one", one)]
    assert names_function(f"```\n{deep}\n{one}\n```", "one", functions, "python")
    first = "def outer():\n    def inner(a, b, c):\n        return a\n"
    functions = [Function("outer", first.strip()), Function("one", one)]
    assert names_function(f"```\n{first}\n{one}\n```", "outer", functions, "python")


@pytest.mark.parametrize(
    ("module", "task", "remedy"),
    [
        ("rouge_score.rouge_scorer", "scbench_summary", "pip install rouge-score"),
        ("nltk.translate.bleu_score", "scbench_repoqa", "pip install nltk"),
        ("tree_sitter_language_pack", "scbench_repoqa", "pip install nltk"),
    ],
)
def test_a_missing_library_is_named(module, task, remedy, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, module, None)
    data = folder(tmp_path, **{task: [TWO]})
    with pytest.raises(OptionError, match=remedy):
        SCBench(tasks=(task,), data=data).questions(4096)


def folder(path, **tasks) -> str:
    for name, examples in tasks.items():
        (path / f"{name}.jsonl").write_text(
            "\n".join(json.dumps(each, ensure_ascii=False) for each in examples), "utf-8"
        )
    return str(path)


def words(*numbers: int) -> str:
    return " ".join(f"w{number}" for number in numbers)


def worded(number: int) -> dict:
    """Return an example of three turns that a tokenizer of words can read."""
    return example(
        *(turn(words(number, 9, each), [words(each)]) for each in range(3)),
        context=words(*range(number, number + 60)),
    )


def records_of(task: SCBench, done=(), name="headinfer") -> list[Record]:
    closed, answerer = answering(shared_model("llama3"), name, context_tokens=600)
    with closed:
        return list(task.records(128, answerer, done))


@pytest.mark.covering(most=1)
@pytest.mark.parametrize("mode", Mode)
def test_every_turn_of_every_example_has_a_record(mode, tmp_path):
    data = folder(
        tmp_path,
        scbench_vt=[worded(1), worded(2)],
        scbench_mf=[example(turn("The w1 is", 3), context=words(5, 6))],
    )
    tasks = found_tasks(data)
    assert tasks == ("scbench_vt", "scbench_mf")
    task = SCBench(tasks=tasks, data=data, mode=mode, samples=5)
    records = records_of(task)
    assert len(records) == task.questions(128) == 7
    names = [record.question for record in records]
    assert len(set(names)) == 7
    assert [record.labels["turn"] for record in records] == [0, 1, 2, 0, 1, 2, 0]
    assert records_of(task, done=names) == []
    # A conversation is gone through once more for the turns that are missing.
    again = records_of(task, done=names[:4])
    assert [record.question for record in again] == names[4:]
    assert [record.answer.tokens for record in again] == [
        record.answer.tokens for record in records[4:]
    ]
    stock = records_of(task, name="standard")
    assert [record.answer.tokens for record in stock] == [
        record.answer.tokens for record in records
    ]


def test_scores_are_means_of_tasks_and_what_was_kept_is_told(tmp_path):
    data = folder(tmp_path, scbench_vt=[worded(1)])
    task = SCBench(tasks=("scbench_vt", "scbench_kv"), data=data)
    (vt,) = [records_of(SCBench(tasks=("scbench_vt",), data=data))]
    mean = sum(record.score for record in vt) / 3
    assert task.scores(vt) == {"average": mean, "vt": mean, "kv": None}
    kept = sum(record.answer.kept_tokens for record in vt)
    read = sum(record.answer.kept_tokens + record.answer.read_tokens for record in vt)
    assert kept > 60
    (remark,) = task.remarks(vt)
    assert remark.startswith(f"{kept:,} of {read:,} prompt tokens not computed again, about ")
    assert task.remarks(()) == []


def test_more_turns_than_the_official_five_are_left_out(tmp_path):
    data = folder(tmp_path, scbench_kv=[example(*[turn("w1", "w2")] * 7)])
    assert SCBench(tasks=("scbench_kv",), data=data).questions(1024) == 5


@pytest.mark.parametrize("made", scbench_data.MADE_TASKS)
def test_made_examples_fill_the_context_and_answer_their_own_questions(made):
    def drawn(seed):
        return list(scbench_data.made_examples(made, 2, seed, 3000, CHAT, raw=False))

    examples = drawn(1)
    assert examples == drawn(1)
    assert examples != drawn(2)
    assert [number for number, _ in examples] == [0, 1]
    for _, each in examples:
        tokens = sum(map(len, of_turns(made, each, CHAT, raw=False)))
        assert 2600 < tokens <= 3000
        assert len(each["multi_turns"]) == 5
        for said in each["multi_turns"]:
            text = str(each["context"])
            assert all(right in text for right in expected(made, said))
            answers = " ".join(expected(made, said))
            assert score(made, answers, said, each, ()) == 1
            assert score(made, "", said, each, ()) == 0


def test_made_numbers_are_what_is_asked_for():
    ((_, each),) = scbench_data.made_examples("scbench_mf", 1, 0, 700, CHAT, raw=False)
    ranked = sorted(each["context"])
    answers = {said["input"]: said["answer"] for said in each["multi_turns"]}
    assert answers["The largest number is"] == ranked[-1]
    assert answers["The second largest number is"] == ranked[-2]
    assert answers["The smallest number is"] == ranked[0]
    assert answers["The second smallest number is"] == ranked[1]
    assert sum(number < answers["The median number is"] for number in ranked) <= len(ranked) // 2


def test_made_examples_that_do_not_fit_are_refused():
    with pytest.raises(OptionError, match="smallest example has"):
        list(scbench_data.made_examples("scbench_kv", 1, 0, 100, CHAT, raw=False))


def test_a_task_is_made_again_from_its_values():
    task = SCBench(tasks=("scbench_kv",), data="made", mode=Mode.REQUESTS, samples=3, seed=5)
    assert task_from_json(json.loads(json.dumps(task.to_json()))) == task
    assert any("MADE-UP" in line for line in task.told())
    assert task.max_new_tokens == FORMS["scbench_kv"].new_tokens


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tasks": ("scbench_x",)}, "not 'scbench_x'"),
        ({"tasks": ("scbench_summary",), "data": "made"}, "tasks made up are scbench_kv, "),
        ({"tasks": ()}, "each once"),
        ({"tasks": ("scbench_kv", "scbench_kv")}, "each once"),
        ({"tasks": ("scbench_kv",), "samples": 0}, "at least 1, not 0"),
    ],
)
def test_bad_values_are_refused(changes, message):
    with pytest.raises(OptionError, match=message):
        SCBench(**changes)


def test_data_without_such_files_is_refused(tmp_path):
    with pytest.raises(OptionError, match="no file or folder of SCBench's"):
        found_tasks(str(tmp_path))
    with pytest.raises(OptionError, match=r"has no scbench_kv\.jsonl"):
        SCBench(tasks=("scbench_kv",), data=str(tmp_path)).questions(1)
    data = folder(tmp_path, scbench_kv=[{"multi_turns": [{"input": "w1"}]}])
    with pytest.raises(OptionError, match="example 0 has a turn without input and answer"):
        SCBench(tasks=("scbench_kv",), data=data).questions(1)


@pytest.mark.parametrize(
    ("task", "changes", "words"),
    [
        ("scbench_kv", {"context": None}, "has no context or input"),
        ("scbench_choice_eng", {}, "turn 0 has no options"),
        ("scbench_choice_eng", {"options": ["Yes", "No"]}, "turn 0 has no four options"),
        ("scbench_choice_eng", {"options": list("abcd")}, "turn 0 has no four options"),
        ("scbench_repoqa", {"lang": "go", "repo": "r"}, "turn 0 has no name"),
        ("scbench_repoqa", {"name": "f", "repo": "r"}, "has no lang"),
        ("scbench_repoqa", {"name": "f", "lang": "cobol", "repo": "r"}, "lang 'cobol'"),
        ("scbench_repoqa", {"name": "f", "lang": "go"}, "has no repo"),
        ("scbench_summary_with_needles", {}, "turn 0 has no task"),
        ("scbench_summary_with_needles", {"task": "scbench_kv"}, "turn 0 is of task 'scbench_kv'"),
        ("scbench_repoqa_and_kv", {"task": "scbench_repoqa", "repo": "r"}, "turn 0 has no name"),
    ],
)
def test_data_without_what_its_task_needs_is_refused(task, changes, words, tmp_path):
    of_turn = {name: changes[name] for name in ("options", "name", "task") if name in changes}
    of_example = {name: changes[name] for name in ("lang", "repo", "context") if name in changes}
    bad = example(turn("One?", "yes", **of_turn)) | of_example
    if bad["context"] is None:
        del bad["context"]
    data = folder(tmp_path, **{task: [bad]})
    with pytest.raises(OptionError, match=f"example 0.* {words}") as raised:
        scbench_data.examples(data, task)
    assert "\n" not in str(raised.value)


def test_data_with_what_its_task_needs_is_taken(tmp_path):
    both = example(
        turn("One?", "yes", task="scbench_kv"),
        turn("Two?", "go()", task="scbench_repoqa", name="f"),
        lang="go",
        repo="r",
    )
    data = folder(tmp_path, scbench_repoqa_and_kv=[both], scbench_choice_eng=[CHOICES])
    assert scbench_data.examples(data, "scbench_repoqa_and_kv") == [both]
    assert scbench_data.examples(data, "scbench_choice_eng") == [CHOICES]


def test_without_the_hubs_library_the_remedy_is_told(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(OptionError, match=r"pip install datasets; or fetch scbench_kv of .*--data"):
        SCBench(tasks=("scbench_kv",)).questions(1)
