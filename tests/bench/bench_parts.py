"""Specs, results and launchers small enough for tests."""

import base64
from array import array
from collections.abc import Callable, Sequence
from typing import Any

from headinfer.bench.arranging import arranged
from headinfer.bench.bound import Rates
from headinfer.bench.launch import Machine
from headinfer.bench.model_spec import ModelSpec
from headinfer.bench.result import TrialFailure, TrialResult
from headinfer.bench.rows import Row
from headinfer.bench.spec import BenchSpec, Command, Fill, TrialSpec
from headinfer.bench.suite import Suite
from headinfer.plan.options import Options

MODEL = ModelSpec(
    layers=2,
    hidden_size=64,
    heads=4,
    kv_heads=2,
    head_dim=16,
    intermediate_size=128,
    vocab_size=97,
)

MACHINE = Machine(
    device="cpu",
    hardware={"cpu": "a processor", "gpu": None, "torch_threads": 2},
    rates=Rates(host_bytes_per_s=1e9, matmul_flops_per_s=1e10),
    rates_by={"host_bytes_per_s": "torch.dot", "matmul_flops_per_s": "1024 x 1024"},
)


def bench_spec(
    contexts: Sequence[int] = (300,),
    methods: Sequence[str] = ("standard", "headinfer"),
    repeats: int = 1,
    dtype: str = "float32",
    command: Command = Command.DECODE,
    fill: Fill = Fill.PREFILL,
) -> BenchSpec:
    return BenchSpec(
        command=command,
        fill=fill,
        methods=tuple(methods),
        contexts=tuple(contexts),
        new_tokens=2,
        repeats=repeats,
        dtype=dtype,
        model=MODEL,
    )


def trial_spec(method: str, dtype: str = "float32", context_tokens: int = 300) -> TrialSpec:
    return TrialSpec(
        method=method,
        context_tokens=context_tokens,
        new_tokens=3,
        dtype=dtype,
        seed=0,
        model=MODEL,
        settings=Options.parse(device="cpu", chunk_tokens="128"),
    )


def logits_row(*values: float) -> str:
    return base64.b64encode(array("f", values).tobytes()).decode()


def trial_result(
    tokens: Sequence[int] = (3, 1, 4),
    logits: Sequence[float] = (3.0, 4.0),
    prefill_s: float | None = 2.0,
    decode_s: Sequence[float] = (0.5, 0.25),
    device: str = "cpu",
    kv_host_bytes: int = 1000,
) -> TrialResult:
    return TrialResult(
        device=device,
        prefill_s=prefill_s,
        decode_s=tuple(decode_s),
        greedy_tokens=tuple(tokens),
        logits=(logits_row(*logits),),
        peak_rss_growth_bytes=1000,
        rss_source="made up",
        kv_host_bytes=kv_host_bytes,
        kv_device_bytes=0,
    )


class FakeLauncher:
    """Answers trials from a function, and keeps what was asked."""

    def __init__(self, answer: Callable[[TrialSpec], TrialResult | TrialFailure]) -> None:
        self._answer = answer
        self.asked: list[tuple[str, int]] = []

    def machine(self, device: str, dtype: str, gpus: int) -> Machine:
        return MACHINE

    def identity(self, device: str) -> dict[str, Any]:
        return {"device": MACHINE.device, "hardware": MACHINE.hardware}

    def trial(self, spec: TrialSpec, time_limit_s: float) -> TrialResult | TrialFailure:
        self.asked.append((spec.method, spec.context_tokens))
        return self._answer(spec)


class NoProgress:
    def started(self, what: str, left_s: float | None) -> None: ...

    def finished(self, what: str, outcome: str) -> None: ...


def rows_of(spec: BenchSpec, launcher: FakeLauncher) -> list[Row]:
    return arranged(spec, list(Suite(spec, launcher, MACHINE.rates, NoProgress()).run()))
