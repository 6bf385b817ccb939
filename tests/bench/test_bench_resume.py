"""Runs that are cut off between the trials of a row: what ended is kept, and not run again."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from bench_parts import FakeLauncher, trial_result
from typer.testing import CliRunner

from headinfer.bench.document import Results
from headinfer.bench.launch import Outcome
from headinfer.bench.report import report
from headinfer.bench.result import Status, TrialFailure
from headinfer.bench.spec import TrialSpec
from headinfer.bench.suite import GATE_TOKENS
from headinfer.cli import bench

_SHAPE = "--layers 2 --hidden-size 64 --heads 4 --kv-heads 2 --head-dim 16 --vocab-size 97"
TINY = _SHAPE.split()
LACK = TrialFailure(status=Status.CANNOT_RUN, reason="out of memory: all", grows=True)
SEARCHED = [1024, 2048, 4096, 8192, 6144, 5120]
"""What a search from 1K on tries where 5000 tokens run."""


def answer(spec: TrialSpec) -> Outcome:
    """Return what a made-up machine finds, the same each time."""
    if spec.context_tokens > 5000:
        return LACK
    return trial_result(decode_s=(0.5, spec.context_tokens / 1e5))


class Run:
    """A verb with a result file, which is stopped at the n-th trial or goes to its end."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, path: Path, *arguments: str) -> None:
        self._monkeypatch = monkeypatch
        self._path = path
        self._arguments = arguments

    def __call__(
        self,
        *more: str,
        stop_at: int | None = None,
        answer: Callable[[TrialSpec], Outcome] = answer,
    ) -> tuple[Any, list[tuple[str, int]]]:
        """Return how it ended, and the trials that it asked for."""

        def stopping(spec: TrialSpec) -> Outcome:
            if len(launcher.asked) == stop_at:
                raise KeyboardInterrupt
            return answer(spec)

        launcher = FakeLauncher(stopping)
        self._monkeypatch.setattr(bench, "make_launcher", lambda: launcher)
        done = CliRunner().invoke(
            bench.app, [*self._arguments, *TINY, "--json", str(self._path), *more]
        )
        return done, launcher.asked

    @property
    def document(self) -> dict[str, Any]:
        return json.loads(self._path.read_text())


@pytest.mark.parametrize(
    ("methods", "gpus"), [(("standard", "bounded"), "1"), (("layers", "heads"), "2")]
)
def test_a_search_goes_on_from_what_was_tried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, methods: tuple[str, str], gpus: str
) -> None:
    arguments = ("max-context", "--contexts", "1K,64K", "--methods", ",".join(methods))
    arguments = (*arguments, "--gpus", gpus)
    whole = Run(monkeypatch, tmp_path / "whole.json", *arguments)
    done, asked = whole()
    assert done.exit_code == 0, done.stderr
    searches = [(method, tokens) for method in methods for tokens in SEARCHED]
    assert asked[-12:] == searches
    cut = Run(monkeypatch, tmp_path / "cut.json", *arguments)
    for tried, resumed in ((3, ()), (4, ("--resume",)), (3, ("--resume",))):
        checks = len(asked) - len(searches) if not resumed else 0
        stopped, again = cut(*resumed, stop_at=checks + tried + 1)
        assert stopped.exit_code == 130
        assert "--resume goes on" in stopped.stderr
        assert again[checks:-1] == searches[:tried]
        searches = searches[tried:]
    rows = cut.document["rows"]
    assert [row["method"] for row in rows] == [methods[0]]  # the other search is not finished
    done, again = cut("--resume")
    assert done.exit_code == 0, done.stderr
    assert again == searches
    assert cut.document["rows"] == whole.document["rows"]
    assert "unfinished" not in cut.document


def test_an_unfinished_search_is_no_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(monkeypatch, tmp_path / "out.json", "max-context", "--methods", "standard")
    stopped, asked = run(stop_at=4)
    assert stopped.exit_code == 130
    assert asked[1:] == [("standard", tokens) for tokens in SEARCHED[:3]]
    document = run.document
    assert document["rows"] == []
    assert [trial["context_tokens"] for trial in document["unfinished"]["trials"]] == [1024, 2048]
    results = Results.load(str(tmp_path / "out.json"))
    assert results.arranged_rows == []
    assert "2K" not in report([("out", results)], "plots")


def test_trials_of_a_row_are_kept_between_repeats(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ("decode", "--contexts", "100,6000", "--repeats", "3")
    whole = Run(monkeypatch, tmp_path / "whole.json", *arguments)
    _done, asked = whole()
    checks = [("standard", GATE_TOKENS), ("headinfer", GATE_TOKENS)]
    at_100 = [("standard", 100), ("headinfer", 100)]
    assert asked == [*checks, *(3 * at_100), ("standard", 6000), ("headinfer", 6000)]
    cut = Run(monkeypatch, tmp_path / "cut.json", *arguments)
    assert cut(stop_at=6)[0].exit_code == 130
    assert cut.document["rows"] == []
    assert cut("--resume", stop_at=3)[1] == [("headinfer", 100), *at_100]
    assert [row["method"] for row in cut.document["rows"]] == ["standard"]
    done, again = cut("--resume")
    assert done.exit_code == 0, done.stderr
    assert again == asked[-3:]
    assert cut.document["rows"] == whole.document["rows"]
    assert "unfinished" not in cut.document


def test_a_wrong_trial_that_was_kept_still_makes_its_row_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(spec: TrialSpec) -> Outcome:
        return trial_result(logits=(4.0, 3.0) if spec.method == "headinfer" else (3.0, 4.0))

    run = Run(monkeypatch, tmp_path / "out.json", "decode", "--context", "100", "--repeats", "2")
    assert run(stop_at=3, answer=wrong)[0].exit_code == 130
    done, asked = run("--resume")
    assert done.exit_code == 1
    assert asked[-2:] == [("standard", 100), ("headinfer", 100)]
    assert [row["status"] for row in run.document["rows"]] == ["ok", "mismatch"]


def test_a_trial_that_failed_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failed = TrialFailure(status=Status.FAILED, reason="the process ended with status 1: why")
    run = Run(monkeypatch, tmp_path / "out.json", "max-context", "--methods", "standard")

    def failing(spec: TrialSpec) -> Outcome:
        return failed if spec.context_tokens == 4096 else answer(spec)

    assert run(stop_at=5, answer=failing)[0].exit_code == 130
    _done, asked = run("--resume")
    assert asked == [("standard", tokens) for tokens in SEARCHED[2:]]


def test_a_check_that_failed_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failed = TrialFailure(status=Status.FAILED, reason="the process ended with status 1: why")
    run = Run(monkeypatch, tmp_path / "out.json", "decode", "--context", "4500")

    def failing(spec: TrialSpec) -> Outcome:
        return failed if spec.method == "headinfer" else answer(spec)

    assert run(answer=failing)[0].exit_code == 1
    done, asked = run("--resume")
    assert asked == [("standard", GATE_TOKENS), ("headinfer", GATE_TOKENS), ("headinfer", 4500)]
    assert done.exit_code == 0, done.stderr
    assert [row["status"] for row in run.document["rows"]] == ["ok", "ok"]


def test_checks_go_on_with_the_reference_that_was_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(spec: TrialSpec) -> Outcome:
        return trial_result(logits=(4.0, 3.0) if spec.method == "bounded" else (3.0, 4.0))

    arguments = ("decode", "--context", "4500", "--methods", "headinfer,bounded")
    run = Run(monkeypatch, tmp_path / "out.json", *arguments)
    assert run(stop_at=3, answer=wrong)[0].exit_code == 130
    assert run.document["unfinished"]["reference"]["context_tokens"] == GATE_TOKENS
    done, asked = run("--resume", answer=wrong)
    assert done.exit_code == 1
    assert asked == [("bounded", GATE_TOKENS), ("headinfer", 4500)]
    assert [row["status"] for row in run.document["rows"]] == ["ok", "mismatch"]
    assert "unfinished" not in run.document


def test_another_machine_does_not_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(monkeypatch, tmp_path / "found.json", "max-context", "--contexts", "1K,64K")
    assert run(stop_at=5)[0].exit_code == 130
    there = {"device": "cpu", "hardware": {"cpu": "another one"}}
    monkeypatch.setattr(FakeLauncher, "identity", lambda _launcher, _device: there)
    done, asked = run("--resume")
    assert done.exit_code == 2
    assert "measured with other hardware" in done.stderr
    assert not asked


def test_a_trial_that_ran_out_of_time_is_tried_again_with_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    late = TrialFailure(status=Status.CANNOT_RUN, reason="took longer than 60 s", grows=True)

    def slow(spec: TrialSpec) -> Outcome:
        return late if spec.context_tokens == 4096 else answer(spec)

    arguments = ("max-context", "--contexts", "1K,64K", "--methods", "standard")
    run = Run(monkeypatch, tmp_path / "found.json", *arguments)
    cut, asked = run("--time-limit", "60", stop_at=5, answer=slow)
    assert (cut.exit_code, asked[-1]) == (130, ("standard", 3072))
    done, asked = run("--resume", "--time-limit", "600")
    assert done.exit_code == 0, done.stderr
    assert [tokens for _, tokens in asked] == [4096, 8192, 6144, 5120]
    assert run.document["rows"][0]["context_tokens"] == 4096
