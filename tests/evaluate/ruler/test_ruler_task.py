"""RULER as a task: questions, scores, and what is told where something is missing."""

import re
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lm_eval")

from ruler_files import save_files

from headinfer.bench.methods import METHODS
from headinfer.bench.model_spec import NamedModel
from headinfer.bench.spec import TrialSpec
from headinfer.errors import OptionError
from headinfer.evaluate.answers.answering import Answerer
from headinfer.evaluate.answers.record import Answer, Record
from headinfer.evaluate.answers.task import task_from_json
from headinfer.evaluate.harness import AnsweringLM
from headinfer.evaluate.ruler.form import Form
from headinfer.evaluate.ruler.kinds import KINDS, OFFLINE, check_files, parse_kinds
from headinfer.evaluate.ruler.samples import Maker
from headinfer.evaluate.ruler.task import Ruler
from headinfer.integration.model_shape import model_shape
from headinfer.plan.options import Options
from saved_models import CHAT_TEMPLATE, make_tokenizer
from tiny_models import tiny_model


def answer(text: str) -> Answer:
    return Answer(
        text=text,
        tokens=(5,),
        ties=(False,),
        prompt_tokens=9,
        read_tokens=9,
        prefill_s=1.0,
        decode_s=0.0,
    )


def record(question: str, *, score: float, kind: str) -> Record:
    return Record(
        question=question, expected=("w1",), score=score, answer=answer("w1"), labels={"kind": kind}
    )


def answerer(limit_tokens: int | None = None, *, chat: bool = False) -> Answerer:
    model = tiny_model("llama3", bos_token_id=1, eos_token_id=2, pad_token_id=3)
    spec = TrialSpec(
        method="standard",
        context_tokens=900,
        new_tokens=128,
        dtype="float32",
        seed=0,
        model=NamedModel(name="tiny", location="tiny", config=None, planned=model_shape(model)),
        settings=Options(device="cpu"),
    )
    tokenizer = make_tokenizer()
    if chat:
        tokenizer.chat_template = CHAT_TEMPLATE
    return Answerer(model, tokenizer, METHODS["standard"](model, spec), limit_tokens)


@pytest.fixture
def prompts(monkeypatch: pytest.MonkeyPatch):
    """Let answers be the number that the prompt asks for, and keep the prompts."""
    seen: list[str] = []

    def answered(_: Any, prompt: str, gen_kwargs: Any) -> Answer:
        seen.append(prompt)
        key = re.search(r"for (.+) mentioned in the provided text\?", prompt)[1]
        return answer(" " + re.search(rf"for {re.escape(key)} is: (\S+)\.", prompt)[1])

    monkeypatch.setattr(AnsweringLM, "answer", answered)
    return seen


NEEDLES = ("niah_single_1", "niah_multikey_2")


@pytest.mark.parametrize("chat", [True, False])
@pytest.mark.parametrize("raw", [True, False])
def test_the_right_answer_to_a_whole_prompt_scores(
    prompts: list[str], chat: bool, raw: bool
) -> None:
    task = Ruler(kinds=NEEDLES, samples=2, raw=raw)
    records = list(task.records(900, answerer(chat=chat), ()))
    assert [record.question for record in records] == [
        f"{kind}/{number}" for kind in NEEDLES for number in range(2)
    ]
    assert [record.labels["kind"] for record in records] == [NEEDLES[0]] * 2 + [NEEDLES[1]] * 2
    assert len(records) == task.questions(900)
    assert {record.score for record in records} == {1.0}
    for prompt, record in zip(prompts, records, strict=True):
        assert prompt.startswith("<user>") == (chat and not raw)
        assert re.search(
            r"The special magic number for .+ mentioned in the provided text is$", prompt
        )
        assert record.expected[0] in prompt


def test_what_is_answered_is_not_asked_again(prompts: list[str]) -> None:
    task = Ruler(kinds=NEEDLES, samples=3)
    whole = list(task.records(700, answerer(), ()))
    asked = list(prompts)
    prompts.clear()
    done = {record.question for record in whole[:4]}
    assert list(task.records(700, answerer(), done)) == whole[4:]
    assert prompts == asked[4:]


@pytest.mark.parametrize("limit_tokens", [None, 300])
def test_a_model_answers(limit_tokens: int | None) -> None:
    task = Ruler(kinds=("niah_single_1", "ruler_fwe"), samples=1)
    assert task.max_new_tokens == 128
    for record, new_tokens in zip(
        task.records(800, answerer(limit_tokens), ()), (128, 50), strict=True
    ):
        answer = record.answer
        assert answer.is_cut == (limit_tokens is not None)
        assert len(answer.tokens) == new_tokens or answer.tokens[-1] == 2
        if limit_tokens:
            assert answer.read_tokens == limit_tokens - new_tokens


@pytest.mark.covering
@pytest.mark.parametrize("most", [3000, 1_000_003])
@pytest.mark.parametrize("kind", KINDS)
def test_settings_and_scores_are_the_harnesss(kind: str, most: int, tmp_path: Path) -> None:
    sample = Maker(kind, 3000, make_tokenizer(), folder=str(save_files(tmp_path))).sample(0)
    form = Form(kind, most, sample)
    assert form.gen_kwargs["max_gen_toks"] == KINDS[kind].new_tokens
    assert form.score(sample, " so: " + ", ".join(sample.outputs).upper()) == 1
    assert form.score(sample, "none of them") == 0
    one = form.score(sample, sample.outputs[-1])
    assert one == pytest.approx(1 if "qa" in kind else 1 / len(sample.outputs))


def test_names_of_tasks() -> None:
    assert parse_kinds("all") == tuple(KINDS)
    assert parse_kinds("offline") == OFFLINE
    assert len(KINDS) == 13
    assert len(OFFLINE) == 6
    assert parse_kinds("vt, niah_single_2,ruler_cwe,qa_squad") == (
        "ruler_vt",
        "niah_single_2",
        "ruler_cwe",
        "ruler_qa_squad",
    )
    with pytest.raises(OptionError, match="RULER has no task 'niah'; choose among niah_single_1"):
        parse_kinds("vt,niah")
    with pytest.raises(OptionError, match="named once each"):
        parse_kinds("vt,ruler_vt")


def test_each_task_has_a_score_of_its_own() -> None:
    task = Ruler(kinds=("ruler_vt", "niah_single_1", "ruler_cwe"), samples=2)
    records = [
        record("a", score=1.0, kind="niah_single_1"),
        record("b", score=0.2, kind="ruler_vt"),
        record("c", score=0.6, kind="ruler_vt"),
    ]
    assert task.scores(records) == {
        "average": pytest.approx(0.7),
        "ruler_vt": pytest.approx(0.4),
        "niah_single_1": 1.0,
        "ruler_cwe": None,
    }
    assert task.told() == [
        "prompts and measures of lm-evaluation-harness, 2 samples a task",
    ]
    assert task.remarks(records) == []


def test_a_task_goes_through_json() -> None:
    task = Ruler(kinds=NEEDLES, samples=3, seed=7, raw=True)
    assert task_from_json(task.to_json()) == task


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"niah_single_2 needs PaulGrahamEssays\.json .*--data"):
        check_files(("niah_single_2",), None)
    with pytest.raises(OptionError, match=r"ruler_qa_squad needs dev-v2\.0\.json, which is not in"):
        check_files(("ruler_qa_squad",), str(tmp_path))
    save_files(tmp_path)
    check_files(tuple(KINDS), str(tmp_path))
    task = Ruler(kinds=tuple(KINDS), data="moved since")  # as a report reads it
    assert task.questions(1024) == 13 * task.samples
    with pytest.raises(OptionError, match="samples must be at least 1, not 0"):
        Ruler(kinds=OFFLINE, samples=0)
