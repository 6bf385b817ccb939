"""The method to use in a situation, why, and what to change where none fits."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from headinfer.estimate.methods import APPROXIMATE, CHUNKED, MAX_CONTEXT_TOKENS
from headinfer.estimate.situation import MethodPlan, Situation
from headinfer.estimate.spread import by_layers
from headinfer.plan.host_room import machine_bytes_for
from headinfer.units import counted, counted_tokens, format_bytes, format_seconds, format_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """A change after which a plan fits.

    Attributes:
        device_memory_bytes: the device memory to give; None to leave it.
        host_memory_bytes: the host memory to give; None to leave it.
        context_tokens: the context to ask for; None to leave it.
        gpus: how many to spread the model over, so that weights may stay in CPU memory; None for
            one that holds all of them.
        line: the change in words.
    """

    device_memory_bytes: int | None = None
    host_memory_bytes: int | None = None
    context_tokens: int | None = None
    gpus: int | None = None
    line: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """A choice of what to run.

    Attributes:
        plan: the method; None where none fits.
        why: reasons, one line each.
        changes: where none fits, what would help, each by itself.
    """

    plan: MethodPlan | None
    why: tuple[str, ...]
    changes: tuple[Change, ...] = ()


def choose(situation: Situation, plans: Sequence[MethodPlan], *, streams: bool = True) -> Choice:
    """Choose among the methods of a situation that are exact.

    Ours where it fits: with all KV that the device holds resident, the others are special cases of
    it. Otherwise the fastest that fits.

    Args:
        situation: that all of them are for.
        plans: of all methods.
        streams: whether weights could stay in CPU memory.
    """
    ours = plans[-1]
    exact = [plan for plan in plans if plan.fits and plan.method not in APPROXIMATE]
    if not exact:
        reasons = (*_shortfalls(situation, ours), *_disk_shortfall(situation, ours))
        changes = list(_changes(situation, plans))
        if streams:
            changes[1:1] = _streaming_change(situation, ours)
        return Choice(plan=None, why=reasons, changes=tuple(changes))
    plan = ours if ours.fits else min(exact, key=lambda plan: plan.decode_s_per_token)
    return Choice(plan=plan, why=tuple(_reasons(situation, plans, plan)))


def _reasons(situation: Situation, plans: Sequence[MethodPlan], plan: MethodPlan) -> Iterator[str]:
    by_name = {other.method: other for other in plans}
    if situation.device == "cpu":
        yield "There is no device beside the CPU: tiles are attended where they lie."
    elif plan.tile_heads is None:
        yield f"All of the KV cache, {format_bytes(plan.kv_total_bytes)}, stays in GPU memory."
    elif not plan.streamed_bytes + plan.host_attended_bytes:
        yield (
            f"All of the KV cache, {format_bytes(plan.kv_total_bytes)}, stays in GPU memory: "
            "nothing is streamed."
        )
    else:
        standard = by_name[CHUNKED]
        yield (
            f"The whole KV cache does not fit: even chunked, standard inference needs "
            f"{format_bytes(standard.total_device_bytes)} of GPU memory."
        )
        if plan.resident_bytes:
            yield (
                f"{format_bytes(plan.resident_bytes)} of KV stay in GPU memory: what weights, "
                f"activations, tiles{' and CUDA' if plan.runtime_bytes else ''} leave of "
                f"{format_bytes(situation.device_memory_bytes)}."
            )
        if plan.answer_resident_bytes > plan.resident_bytes:
            yield (
                f"{format_bytes(plan.answer_resident_bytes)} of KV stay there while it answers: a "
                "prompt's activations have gone."
            )
        yield _tile_reason(plan)
        if plan.host_share:
            yield (
                f"In decode steps the CPU attends {format_bytes(plan.host_attended_bytes)} where "
                "they lie, and finishes with the link."
            )
    if situation.disk is not None and plan.kv_disk_bytes:
        disk = situation.disk
        yield (
            f"{format_bytes(plan.kv_disk_bytes)} of KV lie in {disk.folder!r} ({disk.said}), which "
            f"has {format_bytes(disk.free_bytes)} free: a decode step reads "
            f"{format_bytes(plan.disk_read_bytes)} of them."
        )
    if plan.chunk_tokens:
        yield _chunk_reason(situation, plan)
    yield _time_reason(situation, plan)
    yield from position_warning(situation)


def _tile_reason(plan: MethodPlan) -> str:
    heads = counted(plan.tile_heads or 0, "KV head")
    tokens = "all tokens" if plan.tile_tokens is None else counted_tokens(plan.tile_tokens)
    parts = plan.decode_parts
    share = parts.start_s / max(parts.link_s, 1e-9)
    return (
        f"In a decode step {format_bytes(plan.streamed_bytes)} cross the link in tiles of {heads} "
        f"x {tokens}, whatever the context: starting them takes {share:.0%} of that time, "
        "ahead of the copies."
    )


def _chunk_reason(situation: Situation, plan: MethodPlan) -> str:
    chunk = counted_tokens(plan.chunk_tokens or 0)
    taken = f"chunks of {chunk} take {format_bytes(plan.activation_bytes)} of activations"
    if situation.chunk_tokens:
        return f"Prefill {taken}, as was asked for."
    if plan.streamed_bytes:
        return f"Prefill {taken}: smaller ones read the weights more often, larger ones leave less."
    return f"Prefill {taken}."


def _time_reason(situation: Situation, plan: MethodPlan) -> str:
    parts, link = plan.decode_parts, situation.hardware.link_bytes_per_s
    step = format_seconds(plan.decode_s_per_token)
    text = f"A decode step takes {step}, limited by {parts.limited_by}"
    if parts.limited_by == "the link" and link:
        text += f": {format_bytes(plan.streamed_bytes)} at {link / 1e9:.4g} GB/s"
    if parts.limited_by == "the disk":
        hardware = situation.hardware
        text += f" at {hardware.disk_read_bytes_per_s / 1e9:.4g} GB/s"
        text += "" if hardware.disk_measured else ", which is assumed: `headinfer probe --disk`"
    return f"{text}."


def position_warning(situation: Situation) -> Iterator[str]:
    """Say where a context is longer than the model was made for."""
    made_for = situation.shape.max_positions
    if made_for and situation.context_tokens > made_for:
        yield (
            f"{situation.shape.name} was made for {counted_tokens(made_for, 'position')}: beyond "
            "them its answers need another rotary scaling, not another plan."
        )


def _shortfalls(situation: Situation, plan: MethodPlan) -> Iterator[str]:
    """Say what the smallest plan of ours lacks."""
    if plan.device_short_bytes:
        runtime = format_bytes(plan.runtime_bytes)
        memory = "Memory" if situation.device == "cpu" else "GPU memory"
        yield (
            f"{memory} is {format_bytes(plan.device_short_bytes)} short: the smallest plan "
            f"needs {format_bytes(plan.total_device_bytes)}, of which weights "
            f"{format_bytes(plan.weights_bytes)}"
            f"{f' and CUDA itself {runtime}' if plan.runtime_bytes else ''}."
        )
    if plan.host_short_bytes:
        yield (
            f"CPU memory is {format_bytes(plan.host_short_bytes)} short: the KV cache of "
            f"{counted_tokens(situation.context_tokens)} takes "
            f"{format_bytes(plan.kv_host_bytes)} there{_kept_back(situation, plan)}."
        )


def _disk_shortfall(situation: Situation, plan: MethodPlan) -> Iterator[str]:
    """Say what the disk lacks."""
    if situation.disk is not None and plan.disk_short_bytes:
        yield (
            f"The disk is {format_bytes(plan.disk_short_bytes)} short: "
            f"{format_bytes(plan.kv_disk_bytes)} of KV are more than CPU memory holds, and "
            f"{situation.disk.folder!r} has room for {format_bytes(situation.disk.free_bytes)}."
        )


def _kept_back(situation: Situation, plan: MethodPlan) -> str:
    """Say what host memory is needed for beside KV; the paper counts none of it."""
    needed = situation.host_memory_bytes + plan.host_short_bytes
    kept = needed - plan.kv_host_bytes
    if not kept:
        return ""
    return f", and {format_bytes(kept)} are for its page tables, the process and a reserve"


def _changes(situation: Situation, plans: Sequence[MethodPlan]) -> Iterator[Change]:
    """Yield the least memory that would do, and the longest context that does."""
    ours = plans[-1]
    device = situation.device_memory_bytes + ours.device_short_bytes
    host = situation.host_memory_bytes + ours.host_short_bytes
    if ours.device_short_bytes and ours.host_short_bytes:
        yield Change(
            device_memory_bytes=device,
            host_memory_bytes=host,
            line=f"{_more('device', device, ours.device_short_bytes)} together with "
            f"{_more('host', host, ours.host_short_bytes)}",
        )
    elif ours.device_short_bytes:
        line = _more("device", device, ours.device_short_bytes)
        if situation.machine_memory_bytes is not None:
            machine = machine_bytes_for(device, "cpu")
            more = format_bytes(machine - situation.machine_memory_bytes)
            line = f"a machine with {ceiling(machine)} of memory, {more} more"
        yield Change(device_memory_bytes=device, line=line)
    elif ours.host_short_bytes:
        yield Change(host_memory_bytes=host, line=_more("host", host, ours.host_short_bytes))
    if ours.disk_short_bytes and not ours.device_short_bytes:
        more = format_bytes(ours.disk_short_bytes)
        yield Change(line=f"--disk-cache with {more} more free, or as much more --host-memory")
    longest = max(
        MAX_CONTEXT_TOKENS if plan.max_context_tokens is None else plan.max_context_tokens
        for plan in plans
        if plan.method not in APPROXIMATE
    )
    if longest:
        shown = longest // 1024 * 1024 or longest
        yield Change(
            context_tokens=shown, line=f"--context {format_tokens(shown)}, the longest that fits"
        )


def _streaming_change(situation: Situation, ours: MethodPlan) -> Iterator[Change]:
    """Yield what accelerate does with weights that are more than the GPU holds."""
    if situation.device == "cpu" or not ours.device_short_bytes:
        return
    # KV comes first: what CPU memory does not hold of the weights can lie on a disk.
    room = max(situation.host_room_bytes - ours.kv_host_bytes, 0)
    spread = by_layers(situation.shape, [situation.device_memory_bytes], host_bytes=room)
    held_bytes, disk_bytes = spread.host_bytes, spread.disk_bytes
    seconds = situation.hardware.brought_s(held_bytes + disk_bytes, disk_bytes)
    if seconds and not ours.host_short_bytes:
        where = f" and {format_bytes(disk_bytes)} on the disk" if disk_bytes else ""
        yield Change(
            gpus=1,
            line=f"--gpus 1, which keeps {format_bytes(held_bytes)} of the weights in CPU memory"
            f"{where}: at least {format_seconds(seconds)} a token",
        )


def _more(place: str, size_bytes: int, more_bytes: int) -> str:
    return f"--{place}-memory {ceiling(size_bytes)}, {format_bytes(more_bytes)} more"


def ceiling(size_bytes: int) -> str:
    """Return a size to type, rounded up to a tenth of its unit."""
    unit, factor = ("GiB", 2**30) if size_bytes >= 2**30 else ("MiB", 2**20)
    return f"{-(-size_bytes * 10 // factor) / 10:.1f}{unit}"
