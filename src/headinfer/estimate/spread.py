"""A model's layers and weights on several GPUs: by layers, as accelerate, or by heads, as ranks.

Where the GPUs hold all weights, each has as many layers as can be (`even_layers`). Otherwise
`device_map="auto"` of transformers fills one GPU after another with whole layers, each but the last
up to an equal part and something more. The first GPU keeps room for the largest module. What no GPU
holds stays in CPU memory, and what that does not hold on a disk. The first GPU computes both. Tests
compare all of this with what is loaded. Weights that bitsandbytes quantises stay on the GPUs: where
these do not hold them, each share says what it lacks.
"""

import bisect
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from headinfer.plan.even_layers import even_layers
from headinfer.plan.memory import memory_for_weights_bytes, weights_room_bytes
from headinfer.plan.shape import LayerKind, LayerShape, ModelShape
from headinfer.units import counted

_MORE = 1.25
"""What transformers lets a GPU take beyond an equal part, in sizes of the largest module."""

_QUANTISING_SHARE = 0.9
"""What transformers lets weights take of the room it is given, where bitsandbytes quantises."""

_STEP_BYTES = 2**20
"""By how much more memory is tried where GPUs do not hold quantised weights."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """A share of a model: what one GPU holds and computes.

    Attributes:
        shape: its layers, or its heads of all layers, and its weights.
        device_memory_bytes: the most to use of the GPU.
        short_bytes: memory it lacks for weights that can be nowhere else; 0 where they fit.
    """

    shape: ModelShape
    device_memory_bytes: int
    short_bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """A model spread over GPUs.

    Attributes:
        shares: of each GPU that computes, in the order of the layers.
        host_bytes: weights that stay in CPU memory.
        disk_bytes: weights that stay on a disk.
    """

    shares: tuple[Share, ...]
    host_bytes: int = 0
    disk_bytes: int = 0


def by_layers(
    shape: ModelShape,
    memory_bytes: Sequence[int],
    *,
    host_bytes: int | None = None,
    quantising: bool = False,
) -> Spread:
    """Return a model spread by layers over GPUs that give so much memory each.

    Args:
        shape: of the model.
        memory_bytes: the most to use of each GPU.
        host_bytes: the most of CPU memory for weights; None for no limit.
        quantising: whether bitsandbytes quantises weights as they are loaded.
    """
    modules = _modules(shape)
    limits = _limits(memory_bytes, quantising=quantising)
    held, brought = _evenly(shape, limits), list[int]()
    if held is None and quantising:
        held = _least_lacking(shape, memory_bytes)
    if held is None:
        held, brought = _one_after_the_other(shape, limits)
    on_disk = _on_disk([modules[position][1] for position in brought], host_bytes)
    shares = [
        Share(shape=_part(shape, modules, positions, brought, on_disk), device_memory_bytes=given)
        for positions, given in zip(held, memory_bytes, strict=True)
        if any(modules[position][0] is not None for position in positions)
    ]
    shares = [
        replace(
            share,
            shape=replace(share.shape, stage=stage),
            short_bytes=_short_bytes(share) if quantising else 0,
        )
        for stage, share in enumerate(shares)
    ]
    all_bytes = sum(modules[position][1] for position in brought)
    return Spread(shares=tuple(shares), host_bytes=all_bytes - on_disk, disk_bytes=on_disk)


def _limits(memory_bytes: Sequence[int], *, quantising: bool) -> list[int]:
    """Return the most weights on each GPU."""
    share = _QUANTISING_SHARE if quantising else 1.0
    return [int(share * weights_room_bytes(given)) for given in memory_bytes]


def _least_lacking(shape: ModelShape, memory_bytes: Sequence[int]) -> list[list[int]] | None:
    """Return the modules on each GPU if all gave as little more memory as it takes."""

    def with_more(steps: int) -> list[list[int]] | None:
        more = [given + steps * _STEP_BYTES for given in memory_bytes]
        return _evenly(shape, _limits(more, quantising=True))

    most = _quantised_memory_bytes(shape.weights_bytes) // _STEP_BYTES + 1
    return with_more(
        bisect.bisect_left(range(most), True, key=lambda steps: with_more(steps) is not None)
    )


def _quantised_memory_bytes(weights_bytes: int) -> int:
    return memory_for_weights_bytes(math.ceil(weights_bytes / _QUANTISING_SHARE))


def _short_bytes(share: Share) -> int:
    needed = _quantised_memory_bytes(share.shape.weights_bytes)
    return max(needed - share.device_memory_bytes, 0)


def _evenly(shape: ModelShape, limits: Sequence[int]) -> list[list[int]] | None:
    """Return the modules on each GPU, by their places; None where all do not fit."""
    layers, each = len(shape.layers), shape.layer_bytes
    counts = even_layers([each] * layers, shape.embedding_bytes, shape.output_bytes, limits)
    if counts is None:
        return None
    ends = list(itertools.accumulate(counts, initial=1))
    held = [list(range(*stretch)) for stretch in itertools.pairwise(ends)]
    held[0].insert(0, 0)
    held[-1] += [layers + 1] if shape.output_bytes else []
    return held


def _one_after_the_other(
    shape: ModelShape, limits: Sequence[int]
) -> tuple[list[list[int]], list[int]]:
    """Return the modules on each GPU as transformers fills them, and those that are brought."""
    modules = _modules(shape)
    largest = max(size for _, size in modules)
    if len(limits) > 1:
        equal = shape.weights_bytes // len(limits) + int(_MORE * largest)
        limits = [*(min(limit, equal) for limit in limits[:-1]), limits[-1]]
    held: list[list[int]] = [[] for _ in limits]
    brought: list[int] = []
    used, gpu = [0] * len(limits), 0
    for position, (_, size) in enumerate(modules):
        later = max((each for _, each in modules[position + 1 :]), default=0)
        while gpu < len(limits) and used[gpu] + size > limits[gpu] - (0 if gpu else later):
            gpu += 1
        if gpu == len(limits):
            brought.append(position)
        else:
            held[gpu].append(position)
            used[gpu] += size
    held[0] += brought  # accelerate brings them to the first GPU, and there they compute
    return held, brought


def _on_disk(sizes: Sequence[int], host_bytes: int | None) -> int:
    """Return what CPU memory does not hold of some modules, the first of which it has.

    It keeps room for the largest that is still to come, through which all others are read.
    """
    used = 0
    for place, size in enumerate(sizes):
        if host_bytes is not None and used + size + max(sizes[place + 1 :], default=0) > host_bytes:
            return sum(sizes[place:])
        used += size
    return 0


def _modules(shape: ModelShape) -> list[tuple[LayerShape | None, int]]:
    """Return embedding, layers and output matrix, with their bytes; a tied one is not there."""
    layers: list[tuple[LayerShape | None, int]] = [
        (layer, shape.layer_bytes) for layer in shape.layers
    ]
    output: list[tuple[LayerShape | None, int]] = [(None, shape.output_bytes)]
    return [(None, shape.embedding_bytes), *layers, *(output if shape.output_bytes else [])]


def _part(
    shape: ModelShape,
    modules: Sequence[tuple[LayerShape | None, int]],
    positions: Sequence[int],
    brought: Sequence[int],
    on_disk: int,
) -> ModelShape:
    """Return the shape of some of a model's modules, of which some are brought for each use."""
    sizes = {position: modules[position][1] for position in positions}
    coming = [sizes[position] for position in brought if position in sizes]
    outputs = len(modules) - 1 if shape.output_bytes else 0
    return replace(
        shape,
        layers=tuple(
            layer for position in positions if (layer := modules[position][0]) is not None
        ),
        # What is brought lies on the GPU while it is used: a layer of it at the most.
        weights_bytes=sum(sizes.values()) - sum(coming) + max(coming, default=0),
        brought_bytes=sum(coming),
        disk_bytes=on_disk if coming else 0,
        vocab_size=shape.vocab_size if outputs in positions else 0,
        embedding_bytes=sizes.get(0, 0),
        output_bytes=sizes.get(outputs, 0) if outputs else 0,
    )


def by_heads(shape: ModelShape, memory_bytes: Sequence[int]) -> Spread:
    """Return a model spread by heads over ranks that have a GPU each.

    Each has the whole embedding, and a part of all else. See `heads_obstacle` for what cannot be.
    """
    ranks = len(memory_bytes)
    layers = tuple(
        replace(layer, kv_heads=layer.kv_heads // ranks) if layer.kv_heads else layer
        for layer in shape.layers
    )
    own = shape.embedding_bytes + (shape.weights_bytes - shape.embedding_bytes) // ranks
    part = replace(
        shape,
        layers=layers,
        query_heads=shape.query_heads // ranks,
        mlp_width=-(-shape.mlp_width // ranks),
        weights_bytes=own,
        output_bytes=shape.output_bytes // ranks,
        ranks=ranks,
    )
    return Spread(
        shares=tuple(Share(shape=part, device_memory_bytes=given) for given in memory_bytes)
    )


def heads_obstacle(shape: ModelShape, ranks: int) -> str | None:
    """Return why so many ranks cannot share a model's heads; None where they can."""
    if not shape.splits_heads:
        return "transformers does not split the heads of this model"
    heads = {layer.kv_heads for layer in shape.layers if layer.kind is not LayerKind.STATE}
    odd = next((count for count in sorted(heads) if count % ranks), None)
    if odd is not None:
        return f"{ranks} ranks cannot share {counted(odd, 'KV head')} evenly"
    return None
