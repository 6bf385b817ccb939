"""One trial, in a fresh process: from a spec to a result, both as JSON values.

Load, warm up, note the memory, prefill, decode. The prompt and the tokens fed in decode steps are
drawn from the seed, not from the model. Two methods whose likeliest tokens tie in 16 bits then
still see the same input. Every one of their steps can be compared. A cache filled at random is
filled alike for each method, so decode steps can be compared there too.
"""

import base64
import re
import statistics
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import closing, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from headinfer.bench.build import build_model, used_devices
from headinfer.bench.catalogue import Spread
from headinfer.bench.drafted import Drafted
from headinfer.bench.fill import fill_randomly
from headinfer.bench.limits import limit_device, limit_host
from headinfer.bench.machine import measure_shared
from headinfer.bench.methods import METHODS, Method
from headinfer.bench.neighbours import Neighbours
from headinfer.bench.ours import HeadInfer
from headinfer.bench.process_memory import PeakRss
from headinfer.bench.result import Status, TrialFailure, TrialResult, to_json
from headinfer.bench.spec import Fill, TrialSpec
from headinfer.errors import (
    HeadInferError,
    MemoryPlanError,
    ModelLoadError,
    is_bug,
    reason_of,
)
from headinfer.integration.compiler import await_import
from headinfer.integration.model_shape import model_shape
from headinfer.probe.disk import measure_disk
from headinfer.units import format_bytes

_WARM_UP_TOKENS = 512
_WARM_UP_STEPS = 3
"""A cache's second decode step is captured. The third one compares the first replay."""

_PREPARED_TOKENS = 40 * 1024
"""Tokens of a prompt that a GPU passes beforehand: its libraries prepare for each new shape.

Measured with stock attention: that took three seconds for a prompt whose prefill then takes 0.4.
"""
_CLOCKS_UP_S = 0.5
"""How long a GPU is kept busy first: an idle one runs at a fifth of its clock."""

_KEPT_LOGITS = 9
"""Rows of logits kept for the comparison: of the prompt and of the first 8 decode steps."""


def _tokens(spec: TrialSpec, device: torch.device) -> torch.Tensor:
    """Return prompt and decode tokens, `[1, all_tokens]`."""
    generator = torch.Generator().manual_seed(spec.seed + 1)
    shape = (1, spec.all_tokens)
    return torch.randint(spec.model.vocab_size, shape, generator=generator).to(device)


class _Run:
    """A stopwatch of the calls by one method, which keeps what they predict."""

    def __init__(self, method: Method, devices: Sequence[torch.device]) -> None:
        self._method = method
        self._gpus = [device for device in devices if device.type == "cuda"]
        self.greedy_tokens: list[int] = []
        self.logits: list[str] = []

    def prefill(self, tokens: torch.Tensor, cache: Cache) -> float:
        """Pass a prompt `[1, tokens]` through the model by the method's way; return seconds."""
        return self._timed(lambda: self._method.prefill(tokens, cache))

    def step(self, token: torch.Tensor, cache: Cache) -> float:
        """Pass a token, or several `[1, tokens]`; return the seconds to the likeliest next ones."""
        return self._timed(lambda: self._method.step(token, cache))

    def make_ready(self, token: torch.Tensor, cache: Cache) -> None:
        """Make a cache with a prompt ready for steps that are timed, where a method needs it."""
        if isinstance(self._method, HeadInfer):
            self._method.make_ready(token, cache)

    def decode(self, tokens: torch.Tensor, cache: Cache) -> tuple[list[float], int]:
        """Pass tokens `[1, tokens]`, one by one or as many at a time as a draft has accepted.

        Returns:
            Seconds for each token, and the steps there were. Steps with drafts do the same work,
            however many are accepted. So the median step is divided by the tokens of the mean one.
        """
        method, at = self._method, 0
        seconds: list[float] = []
        while at < tokens.shape[1]:
            taken = 1
            if isinstance(method, Drafted):
                taken = method.next_tokens(tokens.shape[1] - at, cache)
            seconds.append(self.step(tokens[:, at : at + taken], cache))
            at += taken
        if len(seconds) < at:
            return [statistics.median(seconds) * len(seconds) / at] * at, len(seconds)
        return seconds, at

    def _synchronize(self) -> None:
        for gpu in self._gpus:
            torch.cuda.synchronize(gpu)

    def _timed(self, call: Callable[[], torch.Tensor]) -> float:
        self._synchronize()
        start_s = time.perf_counter()
        logits = call()
        rows = logits if logits.ndim > 1 else logits[None]
        tokens = rows.argmax(dim=-1).tolist()  # waits for the device
        self._synchronize()
        seconds = time.perf_counter() - start_s
        self.greedy_tokens += tokens
        for row in rows[: max(_KEPT_LOGITS - len(self.logits), 0)]:
            self.logits.append(base64.b64encode(row.float().cpu().numpy().tobytes()).decode())
        return seconds


class _DeviceMemory:
    """A measure of the most memory that torch takes on any GPU, from construction on."""

    def __init__(self, devices: Sequence[torch.device]) -> None:
        self._gpus = [device for device in devices if device.type == "cuda"]
        if self._gpus:
            torch.cuda.empty_cache()
        self.restart()

    def restart(self) -> None:
        """Forget the peaks so far."""
        for gpu in self._gpus:
            torch.cuda.synchronize(gpu)
            torch.cuda.reset_peak_memory_stats(gpu)

    def most(self, peak: Callable[[torch.device], int]) -> int | None:
        """Return the highest of some peak on any GPU; None without one."""
        return max(map(peak, self._gpus), default=None)


def _raise_clocks(devices: Sequence[torch.device], dtype: torch.dtype) -> None:
    """Keep GPUs busy for a moment."""
    gpus = [device for device in devices if device.type == "cuda"]
    squares = [torch.zeros(4096, 4096, dtype=dtype, device=device) for device in gpus]
    end_s = time.perf_counter() + _CLOCKS_UP_S
    while gpus and time.perf_counter() < end_s:
        for square in squares:
            square @ square
        for gpu in gpus:
            torch.cuda.synchronize(gpu)


def _warm_up(spec: TrialSpec, method: Method, run: _Run, tokens: torch.Tensor) -> float | None:
    """Run a prompt and a few steps, so that no timed call is the first of its kind.

    Returns:
        The seconds of the prefill, if the prompt was the one that is timed afterwards.
    """
    if isinstance(method, HeadInfer):  # a long context's form may be one that is compiled for
        method.check_fits(spec.all_tokens)
    timed = tokens.device.type == "cuda" and spec.fill is Fill.PREFILL
    prompt_tokens = min(_PREPARED_TOKENS if timed else _WARM_UP_TOKENS, spec.context_tokens)
    end = min(prompt_tokens + _WARM_UP_STEPS, spec.all_tokens)
    cache = method.new_cache(end)
    prefill_s = run.prefill(tokens[:, :prompt_tokens], cache)
    for position in range(prompt_tokens, end):
        run.step(tokens[:, position : position + 1], cache)
    await_import()  # which the first step began; `first_prefill_s` is what a process meets first
    return prefill_s if timed and prompt_tokens == spec.context_tokens else None


@torch.no_grad()
def run_trial(spec: TrialSpec) -> TrialResult:
    """Load the model and measure one method on it.

    Raises:
        HeadInferError: the method refuses the model, the settings or the memory.
    """
    devices = used_devices(spec)
    device = devices[0]
    limit_device(spec.settings, devices)
    model, model_note = build_model(spec, device)
    neighbours = Neighbours()
    tokens = _tokens(spec, device)
    _raise_clocks(devices, model.dtype)
    weights_bytes = model_shape(model).weights_bytes
    with closing(METHODS[spec.method](model, spec)) as method:
        first_prefill_s = _warm_up(spec, method, _Run(method, devices), tokens)
        with limit_host(spec.method, spec.settings, device, weights_bytes):
            result = _measure(spec, method, model, tokens, devices)
    folder = spec.settings.disk_cache
    if folder is not None and result.disk_read_bytes:  # now that the steps' file is gone
        rate = measure_disk(folder, quick=False).best_read_bytes_per_s
        result = replace(result, disk_read_bytes_per_s=rate)
    alone = spec.spread is not Spread.HEADS  # ranks would measure while others do
    if result.host_attended_kv_bytes and device.type == "cuda" and alone:
        with suppress(torch.OutOfMemoryError):  # now that the cache has gone
            result = replace(result, host_shared_bytes_per_s=measure_shared(len(devices)))
    return replace(
        result,
        note="; ".join(filter(None, (result.note, model_note))),
        first_prefill_s=first_prefill_s,
        others_cpu_share=neighbours.cpu_share(),
    )


def _measure(
    spec: TrialSpec,
    method: Method,
    model: PreTrainedModel,
    tokens: torch.Tensor,
    devices: Sequence[torch.device],
) -> TrialResult:
    run, peak = _Run(method, devices), PeakRss()
    memory = _DeviceMemory(devices)
    cache = method.new_cache(spec.all_tokens)
    passed = spec.context_tokens
    if spec.fill is not Fill.PREFILL:
        passed = method.pass_tokens(spec.context_tokens) if spec.last_pass else 0
        recorded = spec.fill is Fill.RECORDED
        fill_randomly(model, cache, spec.context_tokens - passed, spec.seed + 2, recorded=recorded)
        peak.restart()  # writing takes copies that are no method's own
        memory.restart()
    link = [method.link_bytes()]
    prompt = tokens[:, spec.context_tokens - passed : spec.context_tokens]
    prefill_s = run.prefill(prompt, cache) if passed else None
    link.append(method.link_bytes())
    run.make_ready(tokens[:, spec.context_tokens :][:, :1], cache)
    link.append(method.link_bytes())
    decode_s, steps = run.decode(tokens[:, spec.context_tokens :], cache)
    link.append(method.link_bytes())
    held = method.held(cache)
    return TrialResult(
        device=model.device.type,
        note=method.note,
        prefill_s=prefill_s if passed == spec.context_tokens else None,
        decode_s=tuple(decode_s),
        greedy_tokens=tuple(run.greedy_tokens),
        logits=tuple(run.logits),
        peak_rss_growth_bytes=peak.growth_bytes(),
        rss_source=peak.source,
        kv_host_bytes=held.host_bytes,
        kv_device_bytes=held.device_bytes,
        streamed_kv_bytes=held.streamed_bytes,
        host_attended_kv_bytes=held.host_attended_bytes,
        unseen_kv_bytes=held.unseen_bytes,
        format=held.format,
        raw_page_bytes=held.raw_page_bytes,
        kv_disk_bytes=held.disk_bytes,
        disk_read_bytes=held.disk_read_bytes,
        accepted_per_verify=len(decode_s) / steps - 1 if isinstance(method, Drafted) else None,
        draft_s=method.draft_s if isinstance(method, Drafted) else None,
        verify_s=method.verify_s if isinstance(method, Drafted) else None,
        planned_activation_bytes=method.planned_activation_bytes(cache),
        plan=method.sizes(cache),
        prefill_bytes_to_device=link[1][0] - link[0][0],
        prefill_bytes_to_host=link[1][1] - link[0][1],
        decode_bytes_to_device=link[3][0] - link[2][0],
        decode_bytes_to_host=link[3][1] - link[2][1],
        device_peak_allocated_bytes=memory.most(torch.cuda.max_memory_allocated),
        device_peak_reserved_bytes=memory.most(torch.cuda.max_memory_reserved),
        parts=held.parts if spec.spread is not Spread.ONE else (),
    )


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


_CPU_ALLOCATOR = re.compile(r"tried to allocate (\d+) bytes")


def _out_of_memory(error: Exception) -> TrialFailure:
    asked = _CPU_ALLOCATOR.search(str(error))
    what = f"{format_bytes(int(asked[1]))} more could not be had" if asked else _first_line(error)
    what = what.split(" GPU ")[0]  # what CUDA's allocator holds, and advice for its users
    return TrialFailure(status=Status.CANNOT_RUN, reason=f"out of memory: {what}", grows=True)


def failure_of(error: Exception) -> TrialFailure:
    """Return why a method has no result; an error that is nobody's limit is printed, too."""
    if isinstance(error, (HeadInferError, ImportError)):
        return TrialFailure(
            status=Status.CANNOT_RUN,
            reason=reason_of(error),
            grows=isinstance(error, MemoryPlanError),
            ends_run=isinstance(error, ModelLoadError),
        )
    if isinstance(error, (MemoryError, RuntimeError)):
        # torch's CPU allocator raises a plain RuntimeError.
        memory = isinstance(error, (MemoryError, torch.OutOfMemoryError))
        if memory or "allocate memory" in str(error) or "not enough memory" in str(error):
            return _out_of_memory(error)
    traceback.print_exception(error)
    kind = "" if is_bug(error) else f"{type(error).__name__}: "  # else the reason has it
    reason = f"{kind}{reason_of(error)}"
    return TrialFailure(status=Status.FAILED, reason=reason)


def attempt(spec: TrialSpec) -> TrialResult | TrialFailure:
    """Run a trial; errors become a `TrialFailure` that says which."""
    try:
        return run_trial(spec)
    except Exception as error:  # any error becomes a row
        return failure_of(error)


def die_first() -> None:
    """Have this process die when memory runs out, and not the one that started it."""
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")


def answer(values: dict[str, Any]) -> dict[str, Any]:
    """Run the trial of a spec's JSON values; see `headinfer.bench.child`."""
    die_first()
    return to_json(attempt(TrialSpec.from_json(values)))
