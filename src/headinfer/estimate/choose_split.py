"""How to split a model over several GPUs, why, and what is lacking where nothing fits."""

import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from headinfer.estimate.below import Disk
from headinfer.estimate.choose import Change, ceiling, position_warning
from headinfer.estimate.methods import RESIDENT
from headinfer.estimate.situation import Situation
from headinfer.estimate.split_changes import split_changes
from headinfer.estimate.split_plan import Split, SplitPlan
from headinfer.plan.hardware import DISK_BYTES_PER_S
from headinfer.plan.predict import ANSWER_TOKENS
from headinfer.units import counted_tokens, format_bytes, format_seconds, format_tokens

_ALL_ON_GPUS = "--load-in keeps no weights in CPU memory: the GPUs must hold all of them."
_PART_OF_EACH = "transformers lets them take nine tenths of what several GPUs have for weights."


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitChoice:
    """A choice of how to split a model.

    Attributes:
        plan: what was chosen; None where nothing fits.
        why: reasons, one line each.
        command: what to run; empty where nothing fits.
        changes: where nothing fits, what would help, each by itself.
    """

    plan: SplitPlan | None
    why: tuple[str, ...]
    command: str = ""
    changes: tuple[Change, ...] = ()


def choose_split(
    situation: Situation,
    plans: Sequence[SplitPlan],
    memory_bytes: Sequence[int] = (),
    *,
    quantising: bool = False,
) -> SplitChoice:
    """Choose the fastest of ours, prompt and a short answer together; it may be one GPU.

    Args:
        situation: of one GPU.
        plans: of all GPUs.
        memory_bytes: the most to use of each GPU; empty where no changes are to be tried.
        quantising: whether weights are quantised as they are loaded.
    """
    ours = [plan for plan in plans if plan.method == RESIDENT]
    fitting = [plan for plan in ours if plan.fits]
    if not fitting:
        why = [_ALL_ON_GPUS, *[_PART_OF_EACH] * (len(memory_bytes) > 1)] if quantising else []
        why += _shortfalls(situation, ours)
        changes = tuple(split_changes(situation, memory_bytes, quantising=quantising))
        return SplitChoice(plan=None, why=tuple(why), changes=changes)
    best = min(fitting, key=_answer_s)
    others = [plan for plan in ours if plan is not best]
    why = [*_own_reasons(situation, best), *_compared(best, others)]
    why += position_warning(situation)
    return SplitChoice(plan=best, why=tuple(why), command=_command(situation, best))


def _answer_s(plan: SplitPlan) -> float:
    return plan.prefill_s + ANSWER_TOKENS * plan.decode_s_per_token


def _command(situation: Situation, plan: SplitPlan) -> str:
    below = ""
    if plan.packed_share != 1:
        below = f" --kv-cache {situation.host_format.value}"
    if situation.disk is not None and plan.kv_disk_bytes:
        below += f" --disk-cache {shlex.quote(situation.disk.folder)}"
    if plan.gpus == 1 and not plan.brought_bytes:
        return f"headinfer generate{below} ..."
    if plan.split is Split.HEADS:
        ranks = f"torchrun --nproc-per-node {plan.gpus}"
        return f"{ranks} -m headinfer generate --tensor-parallel{below} ..."
    kept = f" --host-memory {ceiling(plan.kv_host_bytes)}" if plan.disk_bytes else ""
    return f"headinfer generate --gpus {plan.gpus}{kept}{below} ..."


def _own_reasons(situation: Situation, plan: SplitPlan) -> Iterator[str]:
    """Say what the GPUs do in a prefill and in a decode step."""
    streamed = format_bytes(plan.streamed_bytes)
    if plan.split is Split.HEADS:
        each = plan.uses[0].kv_heads
        yield (
            f"Each GPU has {each} KV head{'' if each == 1 else 's'} of every layer. All work at "
            f"once, and add up their results twice in a layer, which takes "
            f"{format_seconds(plan.reduce_s)} of a decode step."
        )
        if plan.streamed_bytes:
            yield f"{plan.gpus} links bring {streamed} of KV for each token, all at once."
    elif plan.split is Split.LAYERS:
        layers = ", ".join(str(use.layers) for use in plan.uses)
        yield f"The GPUs have {layers} layers, in the order of the model."
        if plan.brought_bytes:
            yield (
                "Weights that no GPU holds compute on the first one, behind the others. So chunks "
                "of a prompt do not follow each other, and one GPU works at a time."
            )
        else:
            shares = ", ".join(f"{use.busy:.0%}" for use in plan.uses)
            yield (
                f"Chunks of {counted_tokens(plan.chunk_tokens or 0)} follow each other "
                f"through them: they work {shares} of the prefill."
            )
        if plan.streamed_bytes:
            yield (
                f"In a decode step one GPU after the other works: {streamed} of KV cross one link "
                "at a time."
            )
    if plan.packed_share != 1:
        yield _raw_pages(situation, plan)
    if situation.disk is not None and plan.kv_disk_bytes:
        yield _on_disk(situation, situation.disk, plan)
    if plan.brought_bytes:
        yield _brought(situation, plan)


def _raw_pages(situation: Situation, plan: SplitPlan) -> str:
    """Say what CPU memory is set aside for pages that do not pack, and for which GPU."""
    sizes = [format_bytes(use.raw_page_bytes) for use in plan.uses]
    each = f", by GPU: {', '.join(sizes)}" if len(set(sizes)) > 1 else ""
    return (
        f"KV is {situation.host_format.value} in CPU memory, where "
        f"{format_bytes(plan.raw_page_bytes)} are set aside for pages that do not pack{each}."
    )


def _on_disk(situation: Situation, disk: Disk, plan: SplitPlan) -> str:
    hardware, each = situation.hardware, ""
    if plan.split is Split.HEADS:
        each = ", each rank its own part, all at once"
    assumed = "" if hardware.disk_measured else ", which is assumed: `headinfer probe --disk`"
    return (
        f"{format_bytes(plan.kv_disk_bytes)} of KV lie in {disk.folder!r} ({disk.said}), which has "
        f"{format_bytes(disk.free_bytes)} free: a decode step reads "
        f"{format_bytes(plan.disk_read_bytes)} of them{each}. The disk reads "
        f"{hardware.disk_read_bytes_per_s / 1e9:.4g} GB/s{assumed}."
    )


def _brought(situation: Situation, plan: SplitPlan) -> str:
    hardware, disk_bytes = situation.hardware, plan.disk_bytes
    seconds = hardware.brought_s(plan.brought_bytes, disk_bytes)
    rate = (hardware.brought_bytes_per_s or 0.0) / 1e9
    stays = f"{format_bytes(plan.weights_host_bytes)} of weights stay in CPU memory"
    read = ""
    if disk_bytes:
        stays += f" and {format_bytes(disk_bytes)} on the disk. They"
        read = f", and {DISK_BYTES_PER_S / 1e9:.3g} GB/s from the disk, which is assumed"
    else:
        stays += " and"
    return (
        f"{stays} cross the link for each token, and for each chunk of a prompt: "
        f"{format_seconds(seconds)} at {rate:.3g} GB/s, half of what the link does from locked "
        f"memory{read}."
    )


def _compared(best: SplitPlan, others: Sequence[SplitPlan]) -> Iterator[str]:
    """Say what the other splits, and one GPU, would do instead."""
    for plan in others:
        name = "One GPU" if plan.gpus == 1 else f"By {plan.split.value}"
        if plan.obstacle is not None:
            yield f"{name}: not possible, for {plan.obstacle}."
        elif not plan.fits:
            yield f"{name} does not fit: {lacking(plan)}."
        else:
            prefill, decode = plan.prefill_s, plan.decode_s_per_token
            yield (
                f"{name}: {format_seconds(prefill)} and {format_seconds(decode)} a token, "
                f"{prefill / best.prefill_s:.2f} and {decode / best.decode_s_per_token:.2f} times "
                "as long."
            )


def lacking(plan: SplitPlan) -> str:
    """Say what memory a plan of ours lacks."""
    fullest = plan.fullest
    parts = []
    if fullest.short_bytes:
        where = " on the GPU with the least room" if plan.gpus > 1 else ""
        parts.append(
            f"{format_bytes(fullest.short_bytes)} of GPU memory are lacking{where}, where weights "
            f"take {format_bytes(fullest.weights_bytes)}"
        )
    if plan.host_short_bytes:
        parts.append(f"{format_bytes(plan.host_short_bytes)} of CPU memory are lacking")
    if plan.disk_short_bytes:
        parts.append(f"{format_bytes(plan.disk_short_bytes)} of the disk are lacking")
    return ", and ".join(parts)


def _shortfalls(situation: Situation, plans: Sequence[SplitPlan]) -> Iterator[str]:
    yield from _compared(plans[-1], plans)
    longest = max(plan.max_context_tokens or 0 for plan in plans)
    if 0 < longest < situation.context_tokens:
        shown = longest // 1024 * 1024 or longest
        yield f"--context {format_tokens(shown)} is the longest that fits."
