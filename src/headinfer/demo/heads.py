"""Projections of the demo model's attention heads; `weights.py` explains the construction.

Rows of a projection are named by `(head, pair, half)`: RoPE turns dimension `pair` of a head
together with dimension `pair + PAIRS`.
"""

import math
from typing import TYPE_CHECKING

from headinfer.demo.layout import (
    ABSENT,
    AMPLITUDE,
    BEGIN_SCORE,
    FOUND,
    HEAD_DIM,
    KIND,
    MATCH,
    NEAR_DISTANCE,
    PAIRS,
    PAYLOAD_BITS,
    SHARES,
    WORD_BITS,
    Kind,
    Stream,
    frequencies,
)

if TYPE_CHECKING:
    from transformers.models.llama.modeling_llama import LlamaAttention

_SCALE = HEAD_DIM**0.5
"""Attention divides scores by this, so queries are multiplied by it: the constants are nats."""

_NULL = WORD_BITS
"""Value dimension that is 1 where there is no word code, so that every token's value has norm 1."""

_FOUND_ENTRY, _BEGIN_ENTRY, _CODE_ENTRY = 0, 1, 2
"""Entries of the still dimensions: class searched for, first token, and then word codes."""


def _still(head: int, entry: int) -> int:
    """Row of a head's `entry`-th still dimension, the stillest first."""
    return head * HEAD_DIM + PAIRS - 1 - entry // 2 + entry % 2 * PAIRS


def set_near_heads(attention: "LlamaAttention") -> None:
    """Let query heads 0 and 2 of layer 0 copy the code of the noun and of the adjective."""
    query, key = attention.q_proj.weight, attention.k_proj.weight
    places = (
        (Stream.NOUN, Kind.NOUN, Stream.NEAR_NOUN, Stream.NO_NEAR_NOUN),
        (Stream.ADJECTIVE, Kind.ADJECTIVE, Stream.NEAR_ADJECTIVE, Stream.NO_NEAR_ADJECTIVE),
    )
    for kv_head, (code, kind, near, no_near) in enumerate(places):
        head = 2 * kv_head
        for pair, (share, frequency) in enumerate(zip(SHARES, frequencies(), strict=False)):
            root = math.sqrt(AMPLITUDE * share)
            key[kv_head * HEAD_DIM + pair, Stream.KIND] = root
            for current in Kind:
                distance = NEAR_DISTANCE.get(current, (0, 0))[kv_head]
                query[head * HEAD_DIM + pair, current] = (
                    _SCALE * root * math.cos(frequency * distance)
                )
                query[head * HEAD_DIM + pair + PAIRS, current] = (
                    -_SCALE * root * math.sin(frequency * distance)
                )
        value, out = attention.v_proj.weight, attention.o_proj.weight
        for bit in range(WORD_BITS):
            value[kv_head * HEAD_DIM + bit, code.start + bit] = 1
            out[near.start + bit, head * HEAD_DIM + bit] = 1
        value[kv_head * HEAD_DIM + _NULL, Stream.KIND] = 1
        value[kv_head * HEAD_DIM + _NULL, kind] = 0
        out[no_near, head * HEAD_DIM + _NULL] = 1


def set_keeper_heads(attention: "LlamaAttention") -> None:
    """Let query heads 1 and 3 of layer 0 find the keeper's forename and surname."""
    places = (
        (Kind.SAYS, Kind.FORENAME, Stream.FORENAME),
        (Kind.FORENAME, Kind.SURNAME, Stream.SURNAME),
    )
    for kv_head, (current, wanted, place) in enumerate(places):
        head = 2 * kv_head + 1
        _search(
            attention,
            kv_head,
            head,
            current=current,
            wanted=wanted,
            score=FOUND,
            begin_score=ABSENT,
        )
        _copy_payload(attention, kv_head, head, place, range(PAYLOAD_BITS))


def set_number_heads(attention: "LlamaAttention") -> None:
    """Let layer 1 find the halves of the number that stand behind the same adjective and noun."""
    places = (
        (Kind.CUE, Kind.FIRST_HALF, Stream.FIRST_HALF),
        (Kind.FIRST_HALF, Kind.SECOND_HALF, Stream.SECOND_HALF),
    )
    half = PAYLOAD_BITS // 2
    root = math.sqrt(MATCH)
    for kv_head, (current, wanted, place) in enumerate(places):
        for head, bits in (
            (2 * kv_head, range(half)),
            (2 * kv_head + 1, range(half, PAYLOAD_BITS)),
        ):
            _search(
                attention,
                kv_head,
                head,
                current=current,
                wanted=wanted,
                score=KIND,
                begin_score=BEGIN_SCORE,
            )
            _copy_payload(attention, kv_head, head, place, bits)
            for word, near in enumerate((Stream.NEAR_ADJECTIVE, Stream.NEAR_NOUN)):
                for bit in range(WORD_BITS):
                    entry = _CODE_ENTRY + word * WORD_BITS + bit
                    attention.q_proj.weight[_still(head, entry), near.start + bit] = _SCALE * root
                    attention.k_proj.weight[_still(kv_head, entry), near.start + bit] = root


def _search(
    attention: "LlamaAttention",
    kv_head: int,
    head: int,
    *,
    current: Kind,
    wanted: Kind,
    score: float,
    begin_score: float,
) -> None:
    """Let a head at `current` tokens score `wanted` ones, and at any token the first one."""
    query, key = attention.q_proj.weight, attention.k_proj.weight
    query[_still(head, _FOUND_ENTRY), current] = _SCALE * math.sqrt(score)
    key[_still(kv_head, _FOUND_ENTRY), wanted] = math.sqrt(score)
    query[_still(head, _BEGIN_ENTRY), Stream.KIND] = _SCALE * math.sqrt(begin_score)
    key[_still(kv_head, _BEGIN_ENTRY), Kind.BEGIN] = math.sqrt(begin_score)


def _copy_payload(
    attention: "LlamaAttention", kv_head: int, head: int, place: slice, bits: range
) -> None:
    """Let a head write bits of the payload it finds. Values 0 to 7 belong to the near heads."""
    for bit in bits:
        column = WORD_BITS + 1 + bit
        attention.v_proj.weight[kv_head * HEAD_DIM + column, Stream.PAYLOAD.start + bit] = 1
        attention.o_proj.weight[place.start + bit, head * HEAD_DIM + column] = 1
