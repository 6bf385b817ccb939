"""From trials to the rows of a result file. Pure Python, never torch."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from headinfer.bench.bound import Bound, Rates, bound, decode_work, prefill_work
from headinfer.bench.catalogue import spread_of
from headinfer.bench.gate import Verdict
from headinfer.bench.held import DENSE, HeldPart
from headinfer.bench.result import Status, TrialResult
from headinfer.bench.spec import BenchSpec, Fill
from headinfer.bench.spread_bound import above_disk, spread_decode_bound, spread_prefill_bound
from headinfer.bench.variant import Variant
from headinfer.plan.option_values import KVCacheName

NOISY_CPU_SHARE = 0.1
"""Where other programs use more of the CPU than this, a row's times are called noisy."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Percentiles:
    """A set of three percentiles of some seconds, interpolated linearly."""

    p20: float
    p50: float
    p80: float

    @classmethod
    def of(cls, samples: Sequence[float]) -> "Percentiles":
        """Return the percentiles of at least one sample."""
        ordered = sorted(samples)
        return cls(**{f"p{share}": _quantile(ordered, share / 100) for share in (20, 50, 80)})


def _quantile(ordered: Sequence[float], share: float) -> float:
    position = share * (len(ordered) - 1)
    below = math.floor(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (position - below)


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A row: one method, in one form, at one context; an entry of `rows` in a result file.

    Fields that were not measured, because the method did not run or there is no such thing here,
    are None. Seconds are medians; `*_percentiles` holds the rest.

    Attributes:
        method: name of the method.
        context_tokens: tokens of the prompt; the longest found where that was looked for.
        status: how it ended.
        reason: why it is not ok; empty when it is.
        note: what a reader of its numbers must know.
        exact: whether the method's results, in this form, must be the reference's.
        kv_cache: the form that was asked for; None where the method leaves no choice.
        dtype: of weights and KV.
        kv_bytes: bytes of keys and values of prompt and new tokens, by arithmetic.
        fill: how the cache was filled before decoding: by a real prefill, or at random.
        repeats: trials the row is made of.
        new_tokens: decode steps of each.
        device: kind of device.
        prefill_s: seconds of the prefill.
        first_prefill_s: of the same prompt before that, the first of each process: with what
            libraries prepare once for each shape; the median over the repeats.
        prefill_percentiles: over the repeats.
        decode_s_per_token: seconds of a decode step.
        accepted_per_verify: drafts that a verification accepted, on average. A step takes one
            token more. `decode_s_per_token` is the median step by the tokens of the mean one.
        draft_s: seconds of the drafts of one verification, the median of the first repeat.
        verify_s: seconds of a verifying pass, the same.
        decode_percentiles: over the steps of all repeats.
        prefill_x_standard: how many times as fast as the reference in the same run.
        decode_x_standard: the same for a decode step.
        prefill_x_dense: how many times as fast as the same method with dense KV in the same run.
        decode_x_dense: the same for a decode step.
        bound_s: the least possible seconds of what the command times.
        bound_by: what that is limited by.
        bound_fraction: `bound_s` over what was measured; 1 is ideal.
        host_shared_bytes_per_s: the rate of CPU and links at once that the bound counts with: the
            highest that was seen; None without a device.
        prefill_bound_s: the bound of the prefill.
        decode_bound_s: the bound of a decode step.
        peak_rss_growth_bytes: the most of any repeat.
        rss_source: how it was found.
        planned_activation_bytes: what the method planned for activations.
        plan: sizes the method chose.
        kv_host_bytes: KV held in host memory.
        kv_device_bytes: KV held on the device.
        kv_disk_bytes: KV on a disk below host memory; None where the run has no disk.
        disk_read_bytes: KV that a decode step reads from it.
        disk_bound_s: the least seconds in which it does, at the disk's rate.
        format: the form of KV in host memory: "dense", "packed" with every bit the same,
            or "int8" and "fp8", which are not exact.
        bytes_to_device: copied over the link in what the command times, in one trial.
        bytes_to_host: copied back in it. What a prompt sends behind its first token is part of
            neither prefill nor decode, and nor is its time.
        link_bytes_per_s: both over the seconds of the same trial.
        device_peak_allocated_bytes: the most torch allocated on the device, or on any of several.
        device_peak_reserved_bytes: the most it reserved.
        parts: what each GPU has to do with the KV, where the model is spread over several.
        others_cpu_share: share of the CPU that other programs used, the most of any trial.
        gate: the comparison with the reference.
        limited_by: what the longest context was found to be limited by.
        tried: the contexts tried for it, and how each ended.
        prefill_samples_s: every prefill.
        decode_samples_s: every decode step of every repeat.
    """

    method: str
    context_tokens: int
    status: Status
    reason: str = ""
    note: str = ""
    exact: bool = True
    kv_cache: KVCacheName | None = None
    dtype: str
    kv_bytes: int
    fill: Fill = Fill.PREFILL
    repeats: int = 0
    new_tokens: int
    device: str | None = None
    prefill_s: float | None = None
    first_prefill_s: float | None = None
    prefill_percentiles: Percentiles | None = None
    decode_s_per_token: float | None = None
    decode_percentiles: Percentiles | None = None
    accepted_per_verify: float | None = None
    draft_s: float | None = None
    verify_s: float | None = None
    prefill_x_standard: float | None = None
    decode_x_standard: float | None = None
    prefill_x_dense: float | None = None
    decode_x_dense: float | None = None
    bound_s: float | None = None
    bound_by: str | None = None
    bound_fraction: float | None = None
    host_shared_bytes_per_s: float | None = None
    prefill_bound_s: float | None = None
    decode_bound_s: float | None = None
    peak_rss_growth_bytes: int | None = None
    rss_source: str | None = None
    planned_activation_bytes: int | None = None
    plan: dict[str, int] | None = None
    kv_host_bytes: int | None = None
    kv_device_bytes: int | None = None
    kv_disk_bytes: int | None = None
    disk_read_bytes: int | None = None
    disk_bound_s: float | None = None
    format: str = DENSE
    bytes_to_device: int | None = None
    bytes_to_host: int | None = None
    link_bytes_per_s: float | None = None
    device_peak_allocated_bytes: int | None = None
    device_peak_reserved_bytes: int | None = None
    parts: tuple[HeldPart, ...] = ()
    others_cpu_share: float | None = None
    gate: Verdict | None = None
    limited_by: str | None = None
    tried: tuple[tuple[int, str], ...] = field(default=())
    prefill_samples_s: tuple[float, ...] = field(default=())
    decode_samples_s: tuple[tuple[float, ...], ...] = field(default=())

    @property
    def variant(self) -> Variant:
        """The method with the form that was asked for."""
        return Variant(self.method, self.kv_cache)


def row_without_result(
    spec: BenchSpec,
    variant: Variant,
    context_tokens: int,
    status: Status,
    reason: str,
    gate: Verdict | None = None,
) -> Row:
    """Return the row of a method that has nothing to show."""
    return Row(
        method=variant.method,
        kv_cache=variant.kv_cache,
        context_tokens=context_tokens,
        status=status,
        reason=reason,
        exact=variant.exact,
        dtype=spec.dtype,
        fill=spec.fill,
        kv_bytes=spec.model.kv_bytes(context_tokens + spec.new_tokens, spec.dtype),
        new_tokens=spec.new_tokens,
        gate=gate,
    )


def row_of(
    spec: BenchSpec,
    variant: Variant,
    context_tokens: int,
    results: Sequence[TrialResult],
    rates: Rates,
    gate: Verdict | None,
) -> Row:
    """Return the row of a method that ran, from all of its trials; without ratios."""
    first, last = results[0], results[-1]
    rates = rates.raised_to(
        disk_read_bytes_per_s=max(map(_read_bytes_per_s, results)),
        host_shared_bytes_per_s=max(map(_shared_bytes_per_s, results)),
    )
    prefills = [result.prefill_s for result in results if result.prefill_s is not None]
    prefill = Percentiles.of(prefills) if prefills else None
    firsts = [r.first_prefill_s for r in results if r.first_prefill_s is not None]
    decode = Percentiles.of([second for result in results for second in result.decode_s])
    prefill_bound, decode_bound = _bounds(spec, variant.method, context_tokens, first, rates)
    if spec.command.times_prefill:
        limit, measured_s = prefill_bound, prefill.p50 if prefill else math.inf
        copied = (last.prefill_bytes_to_device, last.prefill_bytes_to_host)
        seconds = last.prefill_s or math.inf
    else:
        limit, measured_s = decode_bound, decode.p50
        copied = (last.decode_bytes_to_device, last.decode_bytes_to_host)
        seconds = sum(last.decode_s)
    return replace(
        row_without_result(spec, variant, context_tokens, Status.OK, "", gate),
        note=first.note,
        repeats=len(results),
        device=first.device,
        prefill_s=prefill.p50 if prefill else None,
        first_prefill_s=Percentiles.of(firsts).p50 if firsts else None,
        prefill_percentiles=prefill,
        decode_s_per_token=decode.p50,
        decode_percentiles=decode,
        accepted_per_verify=first.accepted_per_verify,
        draft_s=first.draft_s,
        verify_s=first.verify_s,
        bound_s=limit.seconds,
        bound_by=limit.limited_by,
        bound_fraction=limit.seconds / measured_s,
        host_shared_bytes_per_s=rates.host_shared_bytes_per_s,
        prefill_bound_s=prefill_bound.seconds,
        decode_bound_s=decode_bound.seconds,
        peak_rss_growth_bytes=max(result.peak_rss_growth_bytes for result in results),
        rss_source=first.rss_source,
        planned_activation_bytes=first.planned_activation_bytes,
        plan=first.plan,
        kv_host_bytes=first.kv_host_bytes,
        kv_device_bytes=first.kv_device_bytes,
        **_on_disk(first, rates),
        format=first.format,
        bytes_to_device=copied[0],
        bytes_to_host=copied[1],
        link_bytes_per_s=sum(copied) / seconds if any(copied) else None,
        device_peak_allocated_bytes=_most([r.device_peak_allocated_bytes for r in results]),
        device_peak_reserved_bytes=_most([r.device_peak_reserved_bytes for r in results]),
        parts=first.parts,
        others_cpu_share=max(result.others_cpu_share for result in results),
        prefill_samples_s=tuple(prefills),
        decode_samples_s=tuple(result.decode_s for result in results),
    )


def _read_bytes_per_s(result: TrialResult) -> float:
    """Return the best rate that a trial saw of its disk: behind its steps, or in one of them."""
    in_steps = [result.disk_read_bytes / seconds for seconds in result.decode_s]
    return max([result.disk_read_bytes_per_s, *in_steps])


def _shared_bytes_per_s(result: TrialResult) -> float:
    """Return the best rate that a trial saw of CPU and links at once: behind its steps, or in them.

    A typical step counts, as links work ahead of some. Drafts' steps are of several tokens, so that
    a token's time is none of a step.
    """
    attended = result.host_attended_kv_bytes and result.decode_s
    if not attended or result.accepted_per_verify is not None:
        return result.host_shared_bytes_per_s
    read_bytes = result.streamed_kv_bytes + result.host_attended_kv_bytes
    return max(result.host_shared_bytes_per_s, read_bytes / statistics.median(result.decode_s))


def _on_disk(result: TrialResult, rates: Rates) -> dict[str, Any]:
    """Return the fields about a disk; none where the run has no disk."""
    per_s = rates.disk_read_bytes_per_s
    if per_s is None:
        return {}
    return {
        "kv_disk_bytes": result.kv_disk_bytes,
        "disk_read_bytes": result.disk_read_bytes,
        "disk_bound_s": result.disk_read_bytes / per_s,
    }


def _most(values: Sequence[int | None]) -> int | None:
    return max((value for value in values if value is not None), default=None)


def _bounds(
    spec: BenchSpec, method: str, context_tokens: int, result: TrialResult, rates: Rates
) -> tuple[Bound, Bound]:
    """Return the bounds of prefill and of a decode step, by where the method held its KV."""
    on_device = result.device != "cpu"
    kv_bytes = spec.model.kv_bytes(context_tokens, spec.dtype)
    host_bytes = max(result.kv_host_bytes - result.raw_page_bytes, 0)  # hardly ever does any cross
    host_bytes += result.kv_disk_bytes
    kept_tokens = (result.plan or {}).get("kept_tokens", context_tokens)  # others are dropped
    prefill = prefill_work(
        spec.model,
        spec.dtype,
        context_tokens,
        on_device=on_device,
        streamed_kv_bytes=min(host_bytes, kv_bytes) if on_device else 0,
        unseen_kv_bytes=result.unseen_kv_bytes,
    )
    decode = decode_work(
        spec.model,
        spec.dtype,
        min(kept_tokens, context_tokens),
        on_device=on_device,
        streamed_kv_bytes=result.streamed_kv_bytes if on_device else 0,
        host_kv_bytes=result.host_attended_kv_bytes if on_device else 0,
        unseen_kv_bytes=result.unseen_kv_bytes,
    )
    prefill = replace(prefill, disk_written_bytes=result.kv_disk_bytes)
    decode = replace(decode, disk_read_bytes=result.disk_read_bytes)
    if not (result.parts and on_device):
        return bound(prefill, rates), bound(decode, rates)
    spread = spread_of(method, spec.gpus)
    known = (spec.model, spec.dtype, context_tokens, result.parts, spread, rates)
    return (
        above_disk(spread_prefill_bound(*known, kv_host_bytes=host_bytes), prefill, rates),
        above_disk(spread_decode_bound(*known), decode, rates),
    )
