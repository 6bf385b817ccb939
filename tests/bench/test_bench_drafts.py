"""The method `drafts`: what it replays, that its logits are the reference's, what it refuses."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from bench_parts import MODEL, trial_spec

from headinfer.bench.gate import compare
from headinfer.bench.replay import Replay
from headinfer.bench.result import Status, TrialFailure
from headinfer.bench.spec import Fill, TrialSpec
from headinfer.bench.trial import attempt, run_trial
from headinfer.engine.engine import Engine
from headinfer.errors import OptionError
from headinfer.integration import parts
from headinfer.plan.options import Options
from measurements import WITH_GPU

CONTEXT = 1100  # an eighth of less would be most of it
REPLAY = Replay(drafts=3, accepted=(2, 0, 3), models=("a", "b"))


def spec(method: str, **changes: object) -> TrialSpec:
    settings = Options.parse(device="simulated", chunk_tokens="512", tile_tokens="512")
    return replace(
        trial_spec(method, context_tokens=CONTEXT),
        **{"settings": settings, "fill": Fill.RANDOM, "new_tokens": 6, "replay": REPLAY} | changes,
    )


def test_a_record_is_replayed_and_the_logits_are_the_references() -> None:
    reference, result = (run_trial(spec(name)) for name in ("standard", "drafts"))
    verdict = compare(
        reference, result, dtype="float32", layers=MODEL.layers, context_tokens=CONTEXT
    )
    assert verdict.passed, verdict.reason
    assert verdict.tokens == 6
    assert result.accepted_per_verify == 1.0  # three tokens, one, and the two that are left
    assert len(result.decode_s) == 6
    assert result.draft_s is not None
    assert result.verify_s is not None
    step_s = 2 * result.decode_s[0]
    assert result.draft_s + result.verify_s < 2 * step_s
    assert reference.draft_s is None
    assert "acceptance replayed: 1.7 of 3 drafts in 3 verifications of a, b" in result.note
    assert TrialSpec.from_json(spec("drafts").to_json()) == spec("drafts")


def test_as_many_drafts_are_replayed_as_auto_takes_at_the_most() -> None:
    replay = Replay.parse("9/15")
    reference, result = (
        run_trial(spec(name, replay=replay, new_tokens=20)) for name in ("standard", "drafts")
    )
    verdict = compare(
        reference, result, dtype="float32", layers=MODEL.layers, context_tokens=CONTEXT
    )
    assert verdict.passed, verdict.reason
    assert verdict.tokens == 20
    assert result.accepted_per_verify == 9.0


def test_verifying_passes_are_timed_once_the_cpus_share_has_settled(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The passes before leave the cache as it was, so that the logits are the reference's."""
    monkeypatch.setattr(parts, "measured_hardware", lambda *_args: WITH_GPU.hardware)
    asked: list[bool] = []

    def has_settled_at(_engine: object, new_tokens: int) -> bool:
        assert new_tokens == REPLAY.drafts + 1
        asked.append(len(asked) == 3)
        return asked[-1]

    monkeypatch.setattr(Engine, "has_settled_at", has_settled_at)
    reference, result = (run_trial(spec(name)) for name in ("standard", "drafts"))
    verdict = compare(
        reference, result, dtype="float32", layers=MODEL.layers, context_tokens=CONTEXT
    )
    assert verdict.passed, verdict.reason
    assert asked == [False, False, False, True]
    assert result.plan is not None
    assert 0 < result.plan["verify_host_attended_percent"] < 100


def test_drafts_need_a_record() -> None:
    failure = attempt(spec("drafts", replay=None))
    assert isinstance(failure, TrialFailure)
    assert failure.status is Status.CANNOT_RUN
    assert "give --replay" in failure.reason


def written(path: Path, **changes: object) -> str:
    rows = [
        {"model": "a", "drafter": "itself", "accepted": [[2, 0], [3]]},
        {"model": "a", "drafter": "lookup", "accepted": [[1]]},
        {"model": "b", "drafter": "itself", "accepted": [[]]},
    ]
    values = {"header": {"settings": {"drafts": 3}}, "rows": rows} | changes
    path.write_text(json.dumps(values))
    return str(path)


def test_a_record_is_of_models_that_drafted_themselves(tmp_path: Path) -> None:
    assert Replay.read(written(tmp_path / "record.json")) == REPLAY
    assert REPLAY.mean == pytest.approx(5 / 3)
    for wrong, told in (
        ({"rows": []}, "no verification"),
        ({"rows": [{"drafter": "itself"}]}, "no file of benchmarks/drafts.py"),
        ({"header": {}}, "no file of benchmarks/drafts.py"),
    ):
        with pytest.raises(OptionError, match=told):
            Replay.read(written(tmp_path / "wrong.json", **wrong))
    with pytest.raises(OptionError, match="cannot be read"):
        Replay.read(str(tmp_path / "none.json"))


def test_a_number_may_be_stated_instead_of_a_record() -> None:
    stated = Replay.parse("4/7")
    assert (stated.drafts, stated.accepted, stated.mean) == (7, (4,), 4.0)
    assert stated.note == "acceptance stated, not measured: 4 of 7 drafts"


@pytest.mark.parametrize("text", ["8/7", "0/0", "1/32"])
def test_a_stated_number_is_one_of_drafts(text: str) -> None:
    with pytest.raises(OptionError, match="how many of 1 to 31 drafts are accepted"):
        Replay.parse(text)
