"""The roofline of attention: what a machine can reach at best (Tables 12 and 13, Figures 5 and 8).

One attention operator of one layer has n context tokens and q new tokens (n in prefill, 1 in
decode). It has H query heads on h KV heads, d elements of a key and a value together, b bytes an
element:

    operations   = 2 q n H d            two matrix products: scores, and their sum over values
    device bytes = b (q H d + n h d)    query and output, and every key and value once
    link bytes   = b n h d              every key and value once, when they live on the host

A rate is at best the lowest of the roofs. These are the device's matrix rate, intensity x device
memory rate and, for offloaded keys and values, link intensity x link rate. As in the paper, prefill
counts the full square of tokens; `causal` counts the pairs that a causal mask leaves, about half of
it.
"""

import enum
import math
from collections.abc import Sequence
from dataclasses import dataclass

from headinfer.errors import OptionError
from headinfer.plan.hardware import Hardware
from headinfer.plan.shape import LayerShape, ModelShape

PAPER_CONTEXTS = (1024, 10 * 1024, 100 * 1024)
"""Context tokens of the paper's tables; its operations come out with K = 1024 only."""


class Phase(enum.Enum):
    """What the new tokens are."""

    PREFILL = "prefill"
    """The whole context at once."""

    DECODE = "decode"
    """One token after the context."""


class Operator(enum.Enum):
    """How much of a layer one call attends."""

    FLASH_ATTENTION = "flash attention"
    """All heads."""

    HEAD_WISE = "head-wise"
    """One KV head, with its group of query heads."""


class Bound(enum.Enum):
    """Which roof is the lowest."""

    COMPUTE = "compute"
    MEMORY = "memory"
    LINK = "link"


@dataclass(frozen=True, slots=True, kw_only=True)
class Roof:
    """A roof: what an operator can reach with its keys and values in one place.

    Attributes:
        bytes: moved at the place in question: device memory, or keys and values over the link.
        intensity_flops_per_byte: operations for each of these bytes.
        attainable_flops_per_s: the lowest roof.
        bound: which that is.
    """

    bytes: int
    intensity_flops_per_byte: float
    attainable_flops_per_s: float
    bound: Bound


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A row: one operator at one context, regular and offloaded.

    Attributes:
        phase: prefill or decode.
        operator: all heads, or one KV head.
        context_tokens: keys attended.
        query_heads: query heads of the call.
        kv_heads: KV heads of the call.
        operations: multiplications and additions.
        device: keys and values in device memory.
        offloaded: keys and values in host memory; None on a machine without a link.
    """

    phase: Phase
    operator: Operator
    context_tokens: int
    query_heads: int
    kv_heads: int
    operations: int
    device: Roof
    offloaded: Roof | None


def roofline_rows(
    shape: ModelShape,
    hardware: Hardware,
    contexts: Sequence[int] = PAPER_CONTEXTS,
    *,
    causal: bool = False,
) -> tuple[Row, ...]:
    """Return a row for each phase, operator and context, in this order.

    Args:
        shape: of the model; its first full-attention layer is counted.
        hardware: the ceilings.
        contexts: context lengths in tokens.
        causal: count in prefill only the pairs that a causal mask leaves.

    Raises:
        OptionError: the model has no layer that attends the whole context.
    """
    layer = attended_layer(shape)
    return tuple(
        _row(shape, layer, hardware, phase, operator, tokens, causal=causal)
        for phase in Phase
        for operator in Operator
        for tokens in contexts
    )


def attended_layer(shape: ModelShape) -> LayerShape:
    """Return the first layer whose attention spans the whole context.

    Raises:
        OptionError: there is none.
    """
    if not shape.full_layers:
        raise OptionError(
            f"model {shape.name!r} has no layer that attends the whole context, so nothing of it "
            "is offloaded"
        )
    return shape.full_layers[0]


def link_hidden_from_tokens(shape: ModelShape, hardware: Hardware) -> int | None:
    """Return the smallest prefill chunk whose attention takes as long as its tiles take to arrive.

    Every key and value that crosses the link serves `2 q group / b` operations a byte, whatever the
    context. From this q on that is enough for the matrix rate. None without a link.
    """
    if hardware.link_bytes_per_s is None:
        return None
    group = shape.query_heads / attended_layer(shape).kv_heads
    flops_per_byte = hardware.matmul_flops_per_s / hardware.link_bytes_per_s
    return math.ceil(flops_per_byte * shape.kv_itemsize / (2 * group))


def _row(
    shape: ModelShape,
    layer: LayerShape,
    hardware: Hardware,
    phase: Phase,
    operator: Operator,
    tokens: int,
    *,
    causal: bool,
) -> Row:
    parts = layer.kv_heads if operator is Operator.HEAD_WISE else 1
    query_heads, kv_heads = shape.query_heads // parts, layer.kv_heads // parts
    width = layer.key_dim + layer.value_dim
    new_tokens = tokens if phase is Phase.PREFILL else 1
    pairs = new_tokens * tokens
    if causal and phase is Phase.PREFILL:
        pairs = tokens * (tokens + 1) // 2
    operations = 2 * pairs * query_heads * width
    kv_bytes = tokens * kv_heads * width * shape.kv_itemsize
    device_bytes = new_tokens * query_heads * width * shape.kv_itemsize + kv_bytes

    memory_flops_per_s = operations / device_bytes * hardware.device_bytes_per_s
    roofs = {Bound.COMPUTE: hardware.matmul_flops_per_s, Bound.MEMORY: memory_flops_per_s}
    offloaded = None
    if hardware.link_bytes_per_s is not None:
        link_flops_per_s = operations / kv_bytes * hardware.link_bytes_per_s
        offloaded = _lowest(operations, kv_bytes, roofs | {Bound.LINK: link_flops_per_s})
    return Row(
        phase=phase,
        operator=operator,
        context_tokens=tokens,
        query_heads=query_heads,
        kv_heads=kv_heads,
        operations=operations,
        device=_lowest(operations, device_bytes, roofs),
        offloaded=offloaded,
    )


def _lowest(operations: int, num_bytes: int, roofs: dict[Bound, float]) -> Roof:
    bound = min(roofs, key=lambda name: roofs[name])
    return Roof(
        bytes=num_bytes,
        intensity_flops_per_byte=operations / num_bytes,
        attainable_flops_per_s=roofs[bound],
        bound=bound,
    )
