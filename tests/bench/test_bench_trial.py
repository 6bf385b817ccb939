"""Trials in this process: both methods agree, a damaged one does not, refusals are told."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from types import SimpleNamespace

import numpy
import pytest
import torch
from bench_parts import MODEL, trial_spec

from headinfer.bench import machine, quantised
from headinfer.bench.gate import Verdict, compare
from headinfer.bench.limits import limit_device, limit_host
from headinfer.bench.methods import METHODS
from headinfer.bench.model_spec import NamedModel
from headinfer.bench.neighbours import Neighbours
from headinfer.bench.ours import HeadInfer
from headinfer.bench.process_memory import PeakRss
from headinfer.bench.result import Status, TrialFailure, TrialResult
from headinfer.bench.spec import Fill, TrialSpec
from headinfer.bench.trial import attempt, run_trial
from headinfer.cli.shapes import shape_of
from headinfer.device.host_pages import map_host_memory
from headinfer.errors import MemoryPlanError
from headinfer.plan.options import Options
from headinfer.session import Session
from tiny_models import tiny_model


def verdict_on(method: str, dtype: str) -> Verdict:
    reference, result = (run_trial(trial_spec(name, dtype)) for name in ("standard", method))
    return compare(reference, result, dtype=dtype, layers=MODEL.layers, context_tokens=300)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_headinfer_passes_the_gate(dtype):
    verdict = verdict_on("headinfer", dtype)
    assert verdict.passed, verdict.reason
    assert verdict.tokens == 4


@pytest.mark.parametrize("saved", [False, True], ids=["random weights", "weights of its own"])
def test_stock_heeds_bounds_of_scores(tmp_path, saved):
    model = tiny_model("gemma2")  # whose bounds are low
    model.save_pretrained(tmp_path)
    shape = shape_of(str(tmp_path), dtype="float32")
    where = str(tmp_path) if saved else None
    config = None if saved else model.config.to_dict()
    named = NamedModel(name="tiny", location=where, config=config, planned=shape)
    spec = replace(trial_spec("standard", context_tokens=60), model=named)
    stock, ours = (run_trial(replace(spec, method=name)) for name in ("standard", "headinfer"))
    verdict = compare(stock, ours, dtype="float32", layers=named.layers, context_tokens=60)
    assert verdict.passed, verdict.reason


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
    simulated = Options.parse(device="simulated", chunk_tokens="128", tile_tokens="256")
    result = run_trial(TrialSpec.from_json(values | {"settings": simulated.keywords()}))
    assert result.prefill_bytes_to_host > 0
    assert result.decode_bytes_to_device > 0
    assert result.kv_device_bytes > 0


def test_what_is_compiled_for_a_long_context_is_not_in_the_prompts_time(monkeypatch):
    spec, done = trial_spec("headinfer", context_tokens=200), []
    planned, passed = Session.plan_for, HeadInfer.prefill

    def plan_for(self, batch, tokens, *others, **options):
        done.append(f"plan {tokens}")
        return planned(self, batch, tokens, *others, **options)

    def prefill(self, tokens, cache):
        done.append("prompt")
        return passed(self, tokens, cache)

    monkeypatch.setattr(Session, "plan_for", plan_for)
    monkeypatch.setattr(HeadInfer, "prefill", prefill)
    run_trial(spec)
    assert done.index(f"plan {spec.all_tokens}") < done.index("prompt")


@pytest.mark.parametrize(("new_tokens", "sent"), [(3, 0), (70, 64)])  # of which pages go home
def test_a_decode_counts_no_copies_of_its_prompt(new_tokens, sent):
    settings = Options.parse(device="simulated", chunk_tokens="128", resident_tokens="512")
    spec = trial_spec("headinfer", context_tokens=256)
    spec = replace(spec, settings=settings, new_tokens=new_tokens)
    result = run_trial(spec)
    token_bytes = MODEL.kv_bytes(1, "float32")
    assert result.prefill_bytes_to_host == 128 * token_bytes  # the last chunk's are left to later
    assert result.decode_bytes_to_host == sent * token_bytes


@pytest.mark.covering
@pytest.mark.parametrize(
    "method",
    [
        "chunked-prefill",
        "head-wise-2",
        "head-wise-1",
        "adaptive",
        "bounded",
        "resident",
        "resident-fixed",
        "host-attention",
        "synchronous",
        "headinfer",
    ],
)
@pytest.mark.parametrize("fill", [Fill.PREFILL, Fill.RANDOM])
def test_every_exact_method_agrees_with_the_reference(method, fill):
    keeps = method in ("resident", "resident-fixed", "host-attention", "headinfer")
    settings = Options.parse(
        device="simulated",
        chunk_tokens="128",
        tile_tokens="64",
        device_memory="900KiB" if keeps else "1100KiB",
    )
    reference, result = (
        run_trial(replace(trial_spec(name), settings=settings, fill=fill))
        for name in ("standard", method)
    )
    verdict = compare(reference, result, dtype="float32", layers=MODEL.layers, context_tokens=300)
    assert verdict.passed, verdict.reason
    assert verdict.tokens == (4 if fill is Fill.PREFILL else 3)
    assert (result.prefill_s is None) == (fill is Fill.RANDOM)
    if keeps:
        assert 0 < result.plan["resident_tokens"] < 300
    if method == "host-attention":
        assert result.host_attended_kv_bytes > 0


@pytest.mark.parametrize("size", [4, 8, 16])
def test_chunks_may_be_fixed_by_the_name_of_a_method(size):
    settings = Options.parse(device="simulated", chunk_tokens="128")
    reference, result = (
        run_trial(replace(trial_spec(name), settings=settings))
        for name in ("standard", f"headinfer-chunk-{size}K")
    )
    verdict = compare(reference, result, dtype="float32", layers=MODEL.layers, context_tokens=300)
    assert verdict.passed, verdict.reason
    assert result.plan["chunk_tokens"] == size * 1024


def test_the_last_pass_of_a_prompt_may_be_real_where_the_rest_is_random():
    spec = replace(trial_spec("chunked-prefill"), fill=Fill.RANDOM, last_pass=True)
    chunked, ours = (run_trial(replace(spec, method=name)) for name in (spec.method, "headinfer"))
    verdict = compare(chunked, ours, dtype="float32", layers=MODEL.layers, context_tokens=300)
    assert verdict.passed, verdict.reason
    assert verdict.tokens == 4  # the last pass of 128 tokens predicts one too
    assert ours.prefill_s is None


def test_a_quantised_cache_is_near_the_reference():
    pytest.importorskip("hqq" if not quantised._installed("optimum.quanto") else "optimum.quanto")
    verdict = verdict_on("kv-4bit", "float32")
    assert 0 < verdict.logits_error < 1


def test_device_memory_on_the_cpu_is_a_limit_of_the_system_and_is_lifted_again():
    settings, cpu = Options.parse(device="cpu", device_memory="96MiB"), torch.device("cpu")
    with limit_host("headinfer", settings, cpu, weights_bytes=32 * 2**20):
        torch.ones(40 * 2**20, dtype=torch.uint8)
        with pytest.raises(RuntimeError, match="memory"):
            torch.ones(200 * 2**20, dtype=torch.uint8)
        with pytest.raises(MemoryPlanError, match="cannot map"):
            map_host_memory(200 * 2**20)
    torch.ones(200 * 2**20, dtype=torch.uint8)
    with (
        pytest.raises(MemoryPlanError, match="below the weights"),
        limit_host("headinfer", settings, cpu, weights_bytes=2**30),
    ):
        pass


def test_a_simulated_devices_memory_is_a_limit_of_the_system_for_stock_alone():
    settings = Options.parse(device="simulated", device_memory="96MiB")
    with limit_host("headinfer", settings, torch.device("cpu"), weights_bytes=32 * 2**20):
        torch.ones(200 * 2**20, dtype=torch.uint8)
    with (
        limit_host("chunked-prefill", settings, torch.device("cpu"), weights_bytes=32 * 2**20),
        pytest.raises(RuntimeError, match="memory"),
    ):
        torch.ones(200 * 2**20, dtype=torch.uint8)


def test_device_memory_on_a_gpu_leaves_torch_what_a_card_of_that_size_would(monkeypatch):
    memory, shares = SimpleNamespace(total_memory=80 * 2**30), []
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _device: memory)
    monkeypatch.setattr(
        torch.cuda, "set_per_process_memory_fraction", lambda share, _gpu: shares.append(share)
    )
    for size in ("24GiB", "auto", "512GiB"):
        limit_device(Options.parse(device_memory=size), [torch.device("cuda")])
    assert shares == [23.25 / 80, 1.0]


def test_a_trial_beyond_its_device_memory_is_out_of_memory():
    settings = Options.parse(device="cpu", device_memory="24MiB", chunk_tokens="128")
    spec = replace(trial_spec("standard"), settings=settings, fill=Fill.RANDOM)
    assert isinstance(attempt(spec), TrialResult)
    longer = attempt(replace(spec, context_tokens=2**17))  # 64 MiB of KV
    assert isinstance(longer, TrialFailure)
    assert longer.status is Status.CANNOT_RUN
    assert longer.grows, longer.reason


@pytest.mark.parametrize("dummy", [True, False])
def test_named_models_are_measured(tmp_path, dummy):
    model = tiny_model("mistral-sliding")
    model.save_pretrained(tmp_path)
    shape = shape_of(str(tmp_path), dtype="float32")
    named = NamedModel(
        name="tiny",
        location=None if dummy else str(tmp_path),
        config=model.config.to_dict() if dummy else None,
        planned=shape,
    )
    reference, ours = (
        run_trial(replace(trial_spec(name), model=named)) for name in ("standard", "headinfer")
    )
    verdict = compare(reference, ours, dtype="float32", layers=named.layers, context_tokens=300)
    assert verdict.passed, verdict.reason


@pytest.mark.parametrize(
    ("error", "status", "word"),
    [
        (MemoryError("no more"), Status.CANNOT_RUN, "out of memory"),
        (
            RuntimeError("can't allocate memory: you tried to allocate 2048 bytes."),
            Status.CANNOT_RUN,
            "out of memory: 2.00 KiB more could not be had",
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


def test_of_what_cuda_says_when_memory_ends_the_first_sentences_are_kept(monkeypatch):
    said = "CUDA out of memory. Tried to allocate 1.09 GiB. GPU 0 has a total capacity of 79.18 GiB"

    def broken(_model, _settings):
        raise torch.OutOfMemoryError(f"{said} of which 56.18 GiB is free. See documentation")

    monkeypatch.setitem(METHODS, "broken", broken)
    reason = attempt(trial_spec("broken")).reason
    assert reason == "out of memory: CUDA out of memory. Tried to allocate 1.09 GiB."


def test_peak_memory_is_that_after_the_start_also_when_freed():
    numpy.ones(256 * 2**20 // 8)  # an earlier, higher peak
    peak = PeakRss()
    numpy.ones(64 * 2**20 // 8)
    assert 60 * 2**20 < peak.growth_bytes() < 100 * 2**20


def test_the_cpu_time_of_others_is_told_from_ones_own():
    def work(seconds: float) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            pass

    neighbours = Neighbours()
    work(0.3)
    alone = neighbours.cpu_share()
    neighbours = Neighbours()
    spinning = f"{sys.executable} -c 'while True: pass' >/dev/null 2>&1 & echo $!"
    shell = subprocess.run(["sh", "-c", spinning], stdout=subprocess.PIPE, check=True)
    try:  # its parent has ended, so that it is nobody's child here
        time.sleep(0.5)
    finally:
        os.kill(int(shell.stdout), signal.SIGKILL)
    beside = neighbours.cpu_share()
    assert 0 <= alone <= 1
    assert beside > 0.5 / (os.cpu_count() or 1)


@pytest.mark.parametrize("ends", [True, False])
def test_the_cpu_time_of_programs_that_a_trial_starts_is_its_own(monkeypatch, ends):
    busy_s = iter((0.0, 0.3))
    monkeypatch.setattr("headinfer.bench.neighbours._busy_s", lambda: next(busy_s))
    watch = Neighbours()
    work = "import time\nwhile time.process_time() < 0.4: pass\nprint(flush=True)\n"
    code = work if ends else f"{work}time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as started:
        assert started.stdout is not None
        started.stdout.readline()
        if ends:
            started.wait()
        share = watch.cpu_share()
        started.kill()
    assert share == 0


def test_the_machine_is_measured(monkeypatch):
    monkeypatch.setattr(machine, "_SECONDS", 0.0)
    rates, best_by = machine.measure(
        torch.device("cpu"),
        torch.float32,
        buffer_bytes=2**20,
        host_bytes=2**20,
        matmul_sizes=(64, 128),
    )
    assert rates.host_bytes_per_s > 1e8
    assert rates.matmul_flops_per_s > 1e8
    assert rates.link_bytes_per_s is None
    assert set(best_by) == {"host_bytes_per_s", "matmul_flops_per_s"}
    assert machine.hardware(torch.device("cpu"))["torch_threads"] >= 1


@pytest.mark.gpu
def test_a_gpus_memory_and_link_are_measured():
    rates, best_by = machine.measure(
        torch.device("cuda"), torch.bfloat16, buffer_bytes=2**26, matmul_sizes=(1024,)
    )
    assert rates.device_bytes_per_s > rates.link_bytes_per_s > 1e8
    assert best_by["link_bytes_per_s"] == "pinned copy"
    assert machine.measure_shared(1) > 1e8
