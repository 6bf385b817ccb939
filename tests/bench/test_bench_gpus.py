"""Methods of several GPUs: simulated ones for layers, processes with gloo for heads."""

import contextlib
import os
import signal
import time
import uuid
from dataclasses import replace

import psutil
import pytest
from bench_parts import MODEL, trial_spec

from headinfer.bench import ranked
from headinfer.bench.gate import compare
from headinfer.bench.launch import FreshProcesses
from headinfer.bench.model_spec import NamedModel
from headinfer.bench.result import Status, TrialFailure, TrialResult, from_json
from headinfer.bench.spec import Fill, TrialSpec
from headinfer.bench.trial import attempt, run_trial
from headinfer.cli.shapes import shape_of
from headinfer.plan.options import Options
from tiny_models import tiny_model

EVEN = replace(MODEL, vocab_size=98)
"""Transformers 5.17 splits no vocabulary that the ranks cannot share evenly."""

SETTINGS = {"device": "simulated", "chunk_tokens": "128", "tile_tokens": "64"}


def spec_of(method: str, fill: Fill = Fill.PREFILL, **settings: str) -> TrialSpec:
    options = Options.parse(**(SETTINGS | settings))
    return replace(trial_spec(method), model=EVEN, gpus=2, settings=options, fill=fill)


def in_ranks(spec: TrialSpec) -> TrialResult | TrialFailure:
    return from_json(ranked.answer(spec.to_json()))


def agrees(result: TrialResult, fill: Fill = Fill.PREFILL) -> None:
    reference = run_trial(spec_of("standard", fill))
    verdict = compare(reference, result, dtype="float32", layers=MODEL.layers, context_tokens=300)
    assert verdict.passed, verdict.reason


@pytest.fixture
def environment(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", os.environ.get("CUDA_VISIBLE_DEVICES", ""))


@pytest.mark.covering(most=2)
@pytest.mark.parametrize("fill", [Fill.PREFILL, Fill.RANDOM])
@pytest.mark.parametrize("method", ["one", "one-host", "layers", "layers-host"])
def test_layers_on_several_devices_agree_with_stock(method, fill):
    result = run_trial(spec_of(method, fill, resident_tokens="100"))
    agrees(result, fill)
    assert [part.layers for part in result.parts] == ([1, 1] if "layers" in method else [])
    assert bool(result.host_attended_kv_bytes) == ("host" in method)
    parts = result.parts
    if parts:
        assert sum(part.kv_bytes for part in parts) == MODEL.kv_bytes(303, "float32")
        assert sum(part.streamed_bytes for part in parts) == result.streamed_kv_bytes
        assert [part.resident_tokens for part in parts] == [100, 100]
        worked = [part.prefill_busy for part in parts]
        assert all(share is not None and 0 < share < 1 for share in worked) == (
            fill is Fill.PREFILL
        )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "fill"),
    [pytest.param("heads", Fill.RANDOM, marks=pytest.mark.slow), ("heads-host", Fill.PREFILL)],
)
def test_heads_in_several_processes_agree_with_stock(environment, method, fill):
    before = [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)]
    result = in_ranks(spec_of(method, fill, resident_tokens="100"))
    assert isinstance(result, TrialResult), result
    assert [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)] == before
    agrees(result, fill)
    assert [part.resident_tokens for part in result.parts] == [100, 100]
    assert sum(part.kv_bytes for part in result.parts) == MODEL.kv_bytes(303, "float32")
    assert result.kv_host_bytes >= MODEL.kv_bytes(303, "float32")
    assert bool(result.host_attended_kv_bytes) == (method == "heads-host")


@pytest.mark.slow
def test_a_model_with_weights_of_its_own_is_spread(environment, tmp_path):
    tiny_model("llama3", vocab_size=98).save_pretrained(tmp_path)
    shape = shape_of(str(tmp_path), dtype="float32")
    named = NamedModel(name="tiny", location=str(tmp_path), config=None, planned=shape)
    specs = {
        method: replace(spec_of(method), model=named) for method in ("standard", "layers", "heads")
    }
    reference, layers = (run_trial(specs[method]) for method in ("standard", "layers"))
    for result in (layers, in_ranks(specs["heads"])):
        assert isinstance(result, TrialResult), result
        verdict = compare(
            reference, result, dtype="float32", layers=named.layers, context_tokens=300
        )
        assert verdict.passed, verdict.reason
        assert len(result.parts) == 2


@pytest.mark.slow
def test_ranks_that_refuse_give_a_reason(environment):
    result = in_ranks(spec_of("heads", device_memory="100KiB"))
    assert isinstance(result, TrialFailure)
    assert result.status is Status.CANNOT_RUN
    assert result.reason.startswith("rank ")
    assert "100" in result.reason
    assert result.grows


def ranks_alive(mark: str) -> list[psutil.Process]:
    """Return the ranks that run now with a mark in their environment, whoever their parent is."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            is_rank = "headinfer.bench.rank_program" in process.cmdline()
            if is_rank and process.environ().get("HEADINFER_TEST_MARK") == mark:
                found.append(process)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("limit_s", [3, 20])  # ranks load libraries then, or the trial runs
def test_ranks_end_with_a_trial_that_takes_too_long(environment, monkeypatch, limit_s):
    mark = uuid.uuid4().hex
    monkeypatch.setenv("HEADINFER_TEST_MARK", mark)
    result = FreshProcesses().trial(replace(spec_of("heads"), new_tokens=10**6), limit_s)
    assert isinstance(result, TrialFailure)
    assert f"took longer than {limit_s} s" in result.reason
    end_s = time.monotonic() + 60
    while left := ranks_alive(mark):
        assert time.monotonic() < end_s, left
        time.sleep(0.1)


def test_layers_need_devices_to_lie_on():
    result = attempt(spec_of("layers", device="cpu"))
    assert isinstance(result, TrialFailure)
    assert "there is one CPU" in result.reason
