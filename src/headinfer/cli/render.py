"""Plans and statistics, for people and as JSON."""

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any

from rich.console import Console
from rich.markup import escape

from headinfer.engine.stats import Stats
from headinfer.plan.choices import ALL_TOKENS
from headinfer.plan.plan import Plan
from headinfer.units import format_bytes

_LABEL_WIDTH = 18


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
        f"{stats.prefill_tokens:,} tokens in {stats.prefill_s:.1f} s, "
        f"{stats.prefill_tokens_per_s:,.0f} tokens/s",
    )
    if stats.decode_tokens:
        yield (
            "decode",
            f"{stats.decode_tokens:,} tokens in {stats.decode_s:.1f} s, "
            f"{stats.decode_tokens_per_s:,.1f} tokens/s",
        )
    if stats.capture_s:
        steps = "step" if stats.captures == 1 else "steps"
        yield (
            "captures",
            f"{stats.captures} decode {steps} in {stats.capture_s:.1f} s, not in decode",
        )
    standard = format_bytes(stats.standard_kv_bytes)
    if plan.device == "cpu":
        yield "link", "nothing was copied: the CPU attends where the cache lies"
        yield "KV in CPU memory", f"{format_bytes(stats.host_kv_bytes)} (standard: {standard})"
        return
    yield (
        "link",
        f"{format_bytes(stats.bytes_to_device)} to the device, "
        f"{format_bytes(stats.bytes_to_host)} back, {format_bytes(link_bytes_per_s(stats))}/s",
    )
    peak = stats.peak_device_kv_bytes
    if stats.standard_kv_bytes:
        share = peak / stats.standard_kv_bytes
        of = f"{share:.1%} of the" if share <= 1 else "more than the"
        told = f"{format_bytes(peak)} at the peak, {of} {standard} of standard inference"
        yield "KV in GPU memory", told
    yield "KV in CPU memory", format_bytes(stats.host_kv_bytes)


def print_rows(console: Console, rows: Iterable[tuple[str, str]]) -> None:
    """Print labels and texts in two columns."""
    for label, text in rows:
        console.print(f"[cyan]{label:<{_LABEL_WIDTH}}[/]{escape(text)}")


def plan_as_json(plan: Plan) -> dict[str, Any]:
    """Return a plan as plain values: everything but the single layers' shapes."""
    values: dict[str, Any] = {
        field.name: getattr(plan, field.name)
        for field in dataclasses.fields(plan)
        if field.name != "shape"
    }
    if plan.tile_tokens >= ALL_TOKENS:
        values["tile_tokens"] = "all"
    return values | {
        "approximation": plan.approximation,
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
        "decode_tokens_per_s": stats.decode_tokens_per_s,
        "link_bytes_per_s": link_bytes_per_s(stats),
    }
