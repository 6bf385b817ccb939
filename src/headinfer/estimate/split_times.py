"""How long a prefill and a decode step take on several GPUs.

By layers, one GPU after the other works at a decode step, and the chunks of a prompt follow each
other through them. By heads, all work at once, and add up their results twice in a layer.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from headinfer.estimate.pipeline import pipeline
from headinfer.plan.hardware import Hardware
from headinfer.plan.predict import Predictor, sampled_chunks
from headinfer.plan.shape import ModelShape
from headinfer.plan.step_time import Parts, Placement

_HOOKED_LAYER_START_S = 1.8e-3
"""Seconds to start a layer's own kernels from Python behind accelerate's hooks.

Measured on two H100s, torch 2.11 and transformers 5.17: a step of Llama-3-8B, all resident, took 54
to 57 ms kernel by kernel. Steps are captured but where weights are brought."""

_ALL_REDUCE_S = 20e-6
"""Seconds that an all-reduce takes beyond its bytes. Not measured here: what NCCL is known for."""

_REDUCES_A_LAYER = 2
"""All-reduces of a layer: behind its attention, and behind its MLP."""


@dataclass(frozen=True, slots=True)
class Times:
    """A set of predicted times.

    Attributes:
        prefill_s: seconds of the prefill.
        decode_s: seconds of a decode step.
        busy: share of the prefill in which each GPU works.
        reduce_s: seconds of the step in which results are added up.
    """

    prefill_s: float
    decode_s: float
    busy: tuple[float, ...]
    reduce_s: float = 0.0


_ChunkTimes = Callable[[float, float], list[float]]
"""Returns a chunk's seconds on each GPU, of the tokens before it and of its own."""

Planned = tuple[ModelShape, Placement]
"""What a GPU has of a model, and what it does with the KV of that."""


def layers_times(hardware: Hardware, parts: Sequence[Planned], context_tokens: int) -> Times:
    """Return the times of layers that lie on several GPUs, in their order.

    Weights that are brought compute on the first GPU, behind all others: a chunk waits for the one
    before it then.

    Args:
        hardware: with what one GPU and its link do.
        parts: of each GPU; all with the same chunks.
        context_tokens: of the prompt.
    """
    busy = hardware.with_busy_links(len(parts)).with_shared_disk(len(parts))
    predictors = [Predictor(shape, busy) for shape, _ in parts]
    _, first = parts[0]
    rows = first.batch * min(first.chunk_tokens or context_tokens, context_tokens)
    handed = rows * parts[0][0].hidden_size * parts[0][0].activation_itemsize
    handed_s = handed / _peer_bytes_per_s(busy)

    def chunk_s(past_tokens: float, new_tokens: float) -> list[float]:
        """Return a chunk's seconds on each GPU, the way to the next one included."""
        times = []
        for number, (predictor, (_, placement)) in enumerate(zip(predictors, parts, strict=True)):
            step = predictor.chunk(placement, past_tokens, new_tokens)
            seconds = step.seconds(overlap=placement.overlap)
            times.append(seconds + (handed_s if number < len(parts) - 1 else 0.0))
        return times

    streams = any(shape.brought_bytes for shape, _ in parts)
    chunks_s = _chunks(first.chunk_tokens, context_tokens, chunk_s)
    prefill = pipeline(chunks_s, follow=not streams)
    decode_s = 0.0
    for shape, placement in parts:
        step = Predictor(shape, hardware).decode(placement, context_tokens)
        start_s = len(shape.layers) * _HOOKED_LAYER_START_S if streams else 0.0
        decode_s += max(step.seconds(overlap=placement.overlap), start_s)
    return Times(prefill.seconds, decode_s, prefill.busy)


def heads_times(hardware: Hardware, part: Planned, ranks: int, context_tokens: int) -> Times:
    """Return the times of ranks that have some of the heads each.

    Args:
        hardware: with what one GPU and its link do.
        part: of one rank; all are alike.
        ranks: how many.
        context_tokens: of the prompt.
    """
    shape, placement = part
    busy = shared_hardware(hardware, ranks)
    predictor = Predictor(shape, busy)
    reduces = _REDUCES_A_LAYER * len(shape.layers)

    def reduce_s(tokens: float) -> float:
        """Return the seconds of all all-reduces while so many tokens of each row pass."""
        num_bytes = placement.batch * tokens * shape.hidden_size * shape.activation_itemsize
        passed = 2 * (ranks - 1) / ranks * num_bytes  # as in a ring: to everybody, and back
        return reduces * (_ALL_REDUCE_S + passed / _peer_bytes_per_s(busy))

    def pass_s(step: Parts, tokens: float) -> float:
        step = replace(step, compute_s=step.compute_s + reduce_s(tokens))
        return step.seconds(overlap=placement.overlap)

    def chunk_s(past_tokens: float, new_tokens: float) -> list[float]:
        return [pass_s(predictor.chunk(placement, past_tokens, new_tokens), new_tokens)]

    prefill = pipeline(_chunks(placement.chunk_tokens, context_tokens, chunk_s))
    decode_s = pass_s(predictor.decode(placement, context_tokens), 1)
    return Times(prefill.seconds, decode_s, prefill.busy * ranks, reduce_s(1))


def shared_hardware(hardware: Hardware, ranks: int) -> Hardware:
    """Return what each of some ranks has, while all links and all shares of the CPU are busy."""
    return hardware.with_busy_links(ranks).shared_by(ranks)


def _peer_bytes_per_s(hardware: Hardware) -> float:
    """Return the rate from GPU to GPU; by way of the host it is at most the link's."""
    return hardware.peer_bytes_per_s or hardware.link_bytes_per_s or math.inf


def _chunks(
    chunk_tokens: int | None, context_tokens: int, chunk_s: _ChunkTimes
) -> list[list[float]]:
    """Return the times of all chunks of a prompt, which are taken as equally long."""
    stride, past_tokens, new_tokens = sampled_chunks(chunk_tokens, context_tokens)
    sampled = [chunk_s(past, new_tokens) for past in past_tokens]
    samples = len(sampled)
    chunks = round(stride * samples)
    return [sampled[(2 * chunk + 1) * samples // (2 * chunks)] for chunk in range(chunks)]
