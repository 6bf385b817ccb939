"""Trials in this process: both methods agree, a damaged one does not, refusals are told."""

import numpy
import pytest
import torch
from bench_parts import MODEL, trial_spec

from headinfer.bench import machine
from headinfer.bench.gate import Verdict, compare
from headinfer.bench.methods import METHODS, HeadInfer
from headinfer.bench.process_memory import PeakRss
from headinfer.bench.result import Status, TrialFailure
from headinfer.bench.spec import Settings, TrialSpec
from headinfer.bench.trial import attempt, run_trial


def verdict_on(method: str, dtype: str) -> Verdict:
    reference, result = (run_trial(trial_spec(name, dtype)) for name in ("standard", method))
    return compare(reference, result, dtype=dtype, layers=MODEL.layers, context_tokens=300)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_headinfer_passes_the_gate(dtype):
    verdict = verdict_on("headinfer", dtype)
    assert verdict.passed, verdict.reason
    assert verdict.tokens == 4


class Damaged(HeadInfer):
    """HeadInfer that forgets one token of the prompt before it decodes."""

    def link_bytes(self):
        # Called between prefill and decode, which is all this needs.
        if self._cache is not None and self._cache.get_seq_length() == 300:
            self._cache.crop(-1)
        return super().link_bytes()

    _cache = None

    def new_cache(self, max_tokens):
        self._cache = super().new_cache(max_tokens)
        return self._cache


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_lost_token_fails_the_gate(monkeypatch, dtype):
    monkeypatch.setitem(METHODS, "damaged", Damaged)
    verdict = verdict_on("damaged", dtype)
    assert not verdict.passed
    assert "logits are off" in verdict.reason


def test_a_trial_reports_what_was_held_and_planned():
    standard, ours = (run_trial(trial_spec(name)) for name in ("standard", "headinfer"))
    assert standard.kv_host_bytes == MODEL.kv_bytes(303, "float32")
    assert ours.kv_host_bytes >= MODEL.kv_bytes(303, "float32")
    assert standard.planned_activation_bytes is None
    assert ours.planned_activation_bytes > 0
    assert ours.plan["chunk_tokens"] == 128
    assert len(ours.decode_s) == 3
    assert ours.device == "cpu"


def test_the_simulated_device_counts_bytes_over_the_link():
    values = trial_spec("headinfer").to_json()
    simulated = Settings(device="simulated", chunk_tokens="128", tile_tokens="256")
    result = run_trial(TrialSpec.from_json(values | {"settings": simulated_json(simulated)}))
    assert result.prefill_bytes_to_host > 0
    assert result.decode_bytes_to_device > 0
    assert result.kv_device_bytes > 0


def simulated_json(settings: Settings) -> dict[str, str]:
    return {name: getattr(settings, name) for name in settings.__dataclass_fields__}


@pytest.mark.parametrize(
    ("error", "status", "word"),
    [
        (MemoryError("no more"), Status.CANNOT_RUN, "out of memory"),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried 3 bytes"),
            Status.CANNOT_RUN,
            "out of memory",
        ),
        (ImportError("needs a library"), Status.CANNOT_RUN, "needs a library"),
        (RuntimeError("shape mismatch"), Status.FAILED, "shape mismatch"),
        (KeyError("key"), Status.FAILED, "KeyError"),
    ],
)
def test_errors_become_failures(monkeypatch, error, status, word):
    def broken(_model, _settings):
        raise error

    monkeypatch.setitem(METHODS, "broken", broken)
    outcome = attempt(trial_spec("broken"))
    assert isinstance(outcome, TrialFailure)
    assert outcome.status is status
    assert word in outcome.reason


def test_peak_memory_is_that_after_the_start_also_when_freed():
    numpy.ones(256 * 2**20 // 8)  # an earlier, higher peak
    peak = PeakRss()
    numpy.ones(64 * 2**20 // 8)
    assert 60 * 2**20 < peak.growth_bytes() < 100 * 2**20


def test_the_machine_is_measured(monkeypatch):
    monkeypatch.setattr(machine, "_SECONDS", 0.0)
    rates, best_by = machine.measure(
        torch.device("cpu"), torch.float32, elements=2**18, matmul_sizes=(64, 128)
    )
    assert rates.host_bytes_per_s > 1e8
    assert rates.matmul_flops_per_s > 1e8
    assert rates.link_bytes_per_s is None
    assert set(best_by) == {"host_bytes_per_s", "matmul_flops_per_s"}
    assert machine.hardware(torch.device("cpu"))["torch_threads"] >= 1


@pytest.mark.gpu
def test_a_gpus_memory_and_link_are_measured():
    rates, best_by = machine.measure(
        torch.device("cuda"), torch.bfloat16, elements=2**22, matmul_sizes=(1024,)
    )
    assert rates.device_bytes_per_s > rates.link_bytes_per_s > 1e8
    assert best_by["link_bytes_per_s"] == "pinned copy"
