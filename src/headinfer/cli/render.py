"""Plans and statistics, for people and as JSON."""

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any

from rich.console import Console
from rich.markup import escape

from headinfer.engine.stats import Stats
from headinfer.plan.choices import ALL_TOKENS
from headinfer.plan.plan import Plan
from headinfer.units import counted, format_bytes, format_seconds

_LABEL_WIDTH = 18

_SHORT_S = 0.95
"""Seconds below which a time has milliseconds."""


def print_plan(console: Console, model_name: str, dtype: str, plan: Plan) -> None:
    """Print what runs where and the plan."""
    where = plan.device
    if where == "simulated":
        where = "a simulated device (the CPU, with memory of its own)"
    elif where == "cpu":
        where = "the CPU"
    console.print(
        f"[bold]{escape(model_name)}[/] ({plan.shape.name}, {dtype}) on {where}", highlight=False
    )
    for line in plan.lines():
        console.print(f"  {escape(line)}")


def link_bytes_per_s(stats: Stats) -> float:
    """Return the mean rate over the link while the model ran; 0 when nothing was copied."""
    seconds = stats.prefill_s + stats.decode_s + stats.capture_s
    return (stats.bytes_to_device + stats.bytes_to_host) / seconds if seconds else 0.0


def summary_rows(stats: Stats, plan: Plan) -> Iterator[tuple[str, str]]:
    """Yield labels and texts of what was measured, and of what is not exact."""
    if plan.approximation:
        yield "approximate", plan.approximation
    yield (
        "prefill",
        f"{counted(stats.prefill_tokens, 'token')} in {_duration(stats.prefill_s)}, "
        f"{counted(round(stats.prefill_tokens_per_s), 'token')}/s",
    )
    if stats.device_prefill_s:
        shares = ", ".join(f"{share:.0%}" for share in stats.device_busy)
        yield "GPUs at work", f"{shares} of the prefill"
    if stats.decode_tokens:
        yield (
            "decode",
            f"{counted(stats.decode_tokens, 'token')} in {_duration(stats.decode_s)}, "
            f"{stats.decode_tokens_per_s:,.1f} tokens/s",
        )
    if stats.verifications:
        yield (
            "drafts",
            f"{stats.accepted_tokens:,} of {stats.drafted_tokens:,} accepted, "
            f"{stats.accepted_per_verify:.1f} a verification; {_duration(stats.draft_s)} drafting, "
            f"{_duration(stats.verify_s)} verifying",
        )
    if stats.draft_read_s:
        yield "assistant", f"read the prompt in {_duration(stats.draft_read_s)}"
    if stats.capture_s:
        yield (
            "captures",
            f"{counted(stats.captures, 'decode step')} in "
            f"{_duration(stats.capture_s)}, not in decode",
        )
    if plan.device != "cpu":  # which copies nothing: it attends where the cache lies
        yield from _device_rows(stats)
    yield "KV in CPU memory", _reserved(stats.host_kv_bytes, stats.standard_kv_bytes)


def _device_rows(stats: Stats) -> Iterator[tuple[str, str]]:
    """Yield what tells of a GPU's memory and its link."""
    if stats.bytes_to_device or stats.bytes_to_host:
        yield (
            "link",
            f"{format_bytes(stats.bytes_to_device)} to the device, "
            f"{format_bytes(stats.bytes_to_host)} back, {format_bytes(link_bytes_per_s(stats))}/s",
        )
    else:
        yield "link", "nothing was copied: all of the cache fits in GPU memory"
    if stats.bytes_to_disk:
        read, written = format_bytes(stats.bytes_from_disk), format_bytes(stats.bytes_to_disk)
        yield "disk", f"{written} written, {read} read"
    peak, standard = stats.peak_device_kv_bytes, stats.standard_kv_bytes
    if standard:
        of = f"{format_bytes(peak)} at the peak, {peak / standard:.1%} of the"
        if peak <= standard:
            yield "KV in GPU memory", f"{of} {format_bytes(standard)} of standard inference"
        else:
            yield "KV in GPU memory", _reserved(peak, standard)


def _duration(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds >= _SHORT_S else format_seconds(seconds)


def _reserved(held_bytes: int, used_bytes: int) -> str:
    """Return what a cache takes: it is made for the whole answer, which may end before."""
    if not 0 < used_bytes < held_bytes:
        return format_bytes(held_bytes)
    return f"{format_bytes(used_bytes)}, of {format_bytes(held_bytes)} set aside"


def print_rows(console: Console, rows: Iterable[tuple[str, str]]) -> None:
    """Print labels and texts in two columns."""
    for label, text in rows:
        console.print(f"[cyan]{label:<{_LABEL_WIDTH}}[/]{escape(text)}")


def plan_as_json(plan: Plan) -> dict[str, Any]:
    """Return a plan as plain values: everything but the single layers' shapes."""
    values: dict[str, Any] = {
        field.name: getattr(plan, field.name)
        for field in dataclasses.fields(plan)
        if field.name not in ("shape", "parts", "assistant")
    }
    if plan.parts:
        values["parts"] = [plan_as_json(part) for part in plan.parts]
    if plan.tile_tokens >= ALL_TOKENS:
        values["tile_tokens"] = "all"
    return values | {
        "assistant": dataclasses.asdict(plan.assistant),
        "approximation": plan.approximation,
        "format": plan.shape.host_format.value,
        "arena_bytes": plan.arena_bytes,
        "weights_bytes": plan.shape.weights_bytes,
        "kv_device_bytes": plan.kv_device_bytes,
        "total_device_bytes": plan.total_device_bytes,
        "kv_host_bytes": plan.kv_host_bytes(plan.context_tokens or 0),
    }


def stats_as_json(stats: Stats) -> dict[str, Any]:
    """Return statistics as plain values, with the rates they imply."""
    return dataclasses.asdict(stats) | {
        "prefill_tokens_per_s": stats.prefill_tokens_per_s,
        "device_busy": stats.device_busy,
        "decode_tokens_per_s": stats.decode_tokens_per_s,
        "link_bytes_per_s": link_bytes_per_s(stats),
    }
