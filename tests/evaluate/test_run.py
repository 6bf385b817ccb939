"""A run over methods and contexts: its order, memory that lacks, wrong answers, going on."""

import json
from dataclasses import replace

import pytest
from answers_parts import (
    FakeWorkers,
    Heard,
    Quiz,
    answers_spec,
    lacks_memory,
    record,
    run,
)

from headinfer.bench.result import Status, TrialFailure
from headinfer.bench.spec import Fill
from headinfer.errors import ModelLoadError
from headinfer.evaluate.answers.run import AnswersRow, AnswersRun


def answering_all(job):
    """Answer every question of the quiz that is not answered yet."""
    for number in range(job.task["samples"]):
        if f"q{number}" not in job.done:
            yield record(f"q{number}")


def test_every_method_answers_at_every_context_and_the_reference_comes_first():
    workers = FakeWorkers(answering_all)
    rows = run(answers_spec("bounded", "standard", contexts=(512, 1024)), workers, Heard())
    assert [(job.method, job.context_tokens) for job in workers.jobs] == [
        *(("standard", 512), ("bounded", 512)),
        *(("standard", 1024), ("bounded", 1024)),
    ]
    assert all(row.is_finished and row.status is Status.OK for row in rows.values())
    assert {len(row.records) for row in rows.values()} == {3}
    assert workers.trials == []


def test_a_row_is_told_after_every_answer():
    counts = [
        (len(row.records), row.is_finished)
        for row in AnswersRun(answers_spec("standard"), FakeWorkers(answering_all), Heard()).rows()
    ]
    assert counts == [(1, False), (2, False), (3, False), (3, True)]


def holding(most_tokens):
    """Answer what is cut to so much; lack memory for what is not."""

    def job(job):
        if min(job.context_tokens + 4, job.limit_tokens or 10**9) > most_tokens:
            yield lacks_memory()
        else:
            yield "half the heads"
            yield from answering_all(job)

    return job


def test_a_method_that_lacks_memory_goes_on_with_what_it_is_found_to_hold():
    workers = FakeWorkers(holding(2000), holds=lambda _method: 2000)
    spec = answers_spec("standard", contexts=(1024, 4096, 8192))
    rows = run(spec, workers, Heard())
    assert [job.limit_tokens for job in workers.jobs[:2]] == [None, None]
    assert rows["standard", 1024].limit_tokens is None
    limit = rows["standard", 4096].limit_tokens
    assert 1872 <= limit <= 2000
    assert {trial.fill for trial in workers.trials} == {Fill.PREFILL}
    assert rows["standard", 8192].limit_tokens == limit  # known, and not looked for again
    assert len([job for job in workers.jobs if job.context_tokens == 8192]) == 1
    assert all(row.status is Status.OK and len(row.records) == 3 for row in rows.values())
    assert rows["standard", 4096].notes == ("half the heads",)


def test_a_search_for_what_a_method_holds_goes_on_from_what_was_tried():
    spec = answers_spec("standard", contexts=(4096, 8192))
    whole = FakeWorkers(holding(2000), holds=lambda _method: 2000)
    rows = run(spec, whole, Heard())

    class Stopping(FakeWorkers):
        """Workers that are stopped at their third trial."""

        def trial(self, spec):
            if len(self.trials) == 2:
                raise KeyboardInterrupt
            return super().trial(spec)

    kept = {}
    cut = Stopping(holding(2000), holds=lambda _method: 2000)
    stopped = AnswersRun(spec, cut, Heard(), noted=lambda row: kept.update({row.key: row}))
    with pytest.raises(KeyboardInterrupt):
        list(stopped.rows())
    row = AnswersRow.from_json(json.loads(json.dumps(kept["standard", 4096].to_json())))
    assert (len(row.tried), row.records, row.is_finished) == (2, (), False)
    again = FakeWorkers(holding(2000), holds=lambda _method: 2000)
    assert run(spec, again, Heard(), [row]) == rows
    assert cut.trials + again.trials == whole.trials
    assert len(cut.trials) == 2


def test_an_error_in_a_search_is_not_kept_as_what_a_method_cannot_hold():
    died = TrialFailure(status=Status.FAILED, reason="died")

    class Dying(FakeWorkers):
        """Workers of which the second trial dies."""

        def trial(self, spec):
            found = super().trial(spec)
            return died if len(self.trials) == 2 else found

    kept = []
    workers = Dying(holding(2000), holds=lambda _method: 2000)
    list(AnswersRun(answers_spec("standard"), workers, Heard(), noted=kept.append).rows())
    second = workers.trials[1].context_tokens
    assert all(second not in dict(row.tried) for row in kept)
    assert any(row.tried for row in kept)


def test_a_limit_is_kept_before_the_first_answer_below_it():
    kept = []
    workers = FakeWorkers(holding(2000), holds=lambda _method: 2000)
    list(AnswersRun(answers_spec("standard"), workers, Heard(), noted=kept.append).rows())
    assert kept[-1].limit_tokens
    assert (kept[-1].tried, kept[-1].records) == ((), ())


def test_a_cut_that_lacks_memory_all_the_same_is_made_shorter():
    workers = FakeWorkers(holding(900), holds=lambda _method: 2000)
    row = run(answers_spec("standard"), workers, Heard())["standard", 4096]
    assert row.status is Status.OK
    assert 900 * 15 / 16 - 1 <= row.limit_tokens <= 900
    assert len(row.records) == 3


def test_memory_that_runs_out_after_some_answers_is_first_tried_with_in_a_new_process():
    def job(job):
        yield record(f"q{len(job.done)}")
        if len(job.done) < 2:
            yield lacks_memory()

    workers = FakeWorkers(job)
    row = run(answers_spec("standard"), workers, Heard())["standard", 4096]
    assert [len(job.done) for job in workers.jobs] == [0, 1, 2]
    assert workers.trials == []
    assert row.limit_tokens is None
    assert len(row.records) == 3


def test_a_method_that_holds_nothing_cannot_run_and_the_others_do():
    def job(job):
        yield from [lacks_memory()] if job.method == "bounded" else answering_all(job)

    workers = FakeWorkers(job, holds=lambda method: 0 if method == "bounded" else 10**9)
    rows = run(answers_spec("bounded", "standard"), workers, Heard())
    assert rows["bounded", 4096].status is Status.CANNOT_RUN
    assert rows["bounded", 4096].reason == "out of memory: a lot"
    assert rows["bounded", 4096].is_finished
    assert rows["standard", 4096].status is Status.OK


def test_another_failure_keeps_what_was_answered():
    failure = TrialFailure(status=Status.FAILED, reason="ValueError: broke")

    def job(_job):
        yield record("q0")
        yield failure

    row = run(answers_spec("standard"), FakeWorkers(job), Heard())["standard", 4096]
    assert (row.status, row.reason, row.is_finished) == (Status.FAILED, failure.reason, False)
    assert [each.question for each in row.records] == ["q0"]


def test_a_model_that_cannot_be_loaded_ends_the_run():
    failure = TrialFailure(status=Status.CANNOT_RUN, reason="no such model", ends_run=True)
    with pytest.raises(ModelLoadError, match="no such model"):
        run(answers_spec("standard"), FakeWorkers(lambda _job: iter([failure])), Heard())


@pytest.mark.parametrize(
    ("method", "dtype", "ties", "status"),
    [
        ("bounded", "float32", (False, False), Status.MISMATCH),
        ("bounded", "float32", (False, True), Status.OK),
        ("bounded", "bfloat16", (False, False), Status.OK),
        ("kv-4bit", "float32", (False, False), Status.OK),
    ],
)
def test_an_exact_method_must_answer_as_stock_does_in_float32(method, dtype, ties, status):
    def job(job):
        tokens = (5, 6) if job.method == "standard" else (5, 9)
        for number in range(3):
            yield record(f"q{number}", tokens, ties=ties)

    rows = run(answers_spec(method, "standard", dtype=dtype), FakeWorkers(job), Heard())
    assert rows[method, 4096].status is status
    assert rows["standard", 4096].status is Status.OK


def unfinished(method: str, *questions: str, **given) -> AnswersRow:
    row = AnswersRow(method=method, context_tokens=4096, exact=True)
    return replace(row, records=tuple(map(record, questions)), **given)


def test_only_what_is_missing_is_answered_again():
    rows = [
        unfinished("standard", "q0", "q1", "q2", is_finished=True),
        unfinished("bounded", "q1"),
        unfinished("head-wise-1", "q0", status=Status.FAILED, reason="broke", limit_tokens=99),
        unfinished("resident", status=Status.CANNOT_RUN, reason="no GPU", is_finished=True),
    ]
    workers = FakeWorkers(answering_all)
    spec = answers_spec("standard", "bounded", "head-wise-1", "resident")
    done = run(spec, workers, Heard(), rows)
    assert [(job.method, job.done) for job in workers.jobs] == [
        ("bounded", ("q1",)),
        ("head-wise-1", ("q0",)),
    ]
    assert [each.question for each in done["bounded", 4096].records] == ["q1", "q0", "q2"]
    assert done["head-wise-1", 4096].status is Status.OK
    assert done["head-wise-1", 4096].reason == ""


def test_more_samples_are_asked_beside_those_that_are_there():
    rows = [unfinished("standard", "q0", "q1", "q2", is_finished=True)]
    workers = FakeWorkers(answering_all)
    done = run(answers_spec("standard", task=Quiz(samples=5)), workers, Heard(), rows)
    assert len(done["standard", 4096].records) == 5
    assert workers.jobs[0].done == ("q0", "q1", "q2")


def test_a_row_that_was_stopped_before_it_was_judged_is_judged():
    rows = [
        unfinished("standard", "q0", "q1", "q2", is_finished=True),
        replace(
            unfinished("bounded"),
            records=tuple(record(f"q{number}", (9, 9)) for number in range(3)),
        ),
    ]
    done = run(answers_spec("standard", "bounded"), FakeWorkers(answering_all), Heard(), rows)
    assert done["bounded", 4096].status is Status.MISMATCH


def test_a_finished_row_is_judged_where_stock_answers_later():
    alone = replace(
        unfinished("bounded", is_finished=True),
        records=tuple(record(f"q{number}", (9, 9)) for number in range(3)),
    )
    done = run(answers_spec("bounded", "standard"), FakeWorkers(answering_all), Heard(), [alone])
    assert done["standard", 4096].status is Status.OK
    assert done["bounded", 4096].status is Status.MISMATCH


def test_memory_that_runs_out_again_and_again_ends_no_row_that_goes_on():
    def job(job):
        yield record(f"q{len(job.done)}")
        if len(job.done) < 39:
            yield lacks_memory()

    workers = FakeWorkers(job)
    row = run(answers_spec("standard", task=Quiz(samples=40)), workers, Heard())["standard", 4096]
    assert (row.status, len(row.records)) == (Status.OK, 40)


def test_a_person_is_told_of_rows_answers_and_the_time_left():
    told = Heard()
    run(answers_spec("standard", contexts=(1024,)), FakeWorkers(answering_all), told)
    assert told.lines == [
        "begin standard at 1K tokens",
        "standard at 1K tokens: 1 answer, score 100%",
        "standard at 1K tokens: 2 answers, score 100%",
        *["standard at 1K tokens: 3 answers, score 100%"] * 2,
    ]
