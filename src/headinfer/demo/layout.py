"""Constants of the demo model: shape, margins, classes of tokens, places in the residual stream.

`weights.py` explains what they are for.
"""

from enum import IntEnum

HIDDEN, LAYERS, QUERY_HEADS, KV_HEADS, HEAD_DIM = 128, 2, 4, 2, 32
PAIRS = HEAD_DIM // 2
THETA = 2e13
MAX_TOKENS = 1 << 20
"""Longest text for which the margins hold, as `tests/demo/test_demo_weights.py` checks."""

SHARES = (0.1471, 0.1701, 0.1531, 0.0984, 0.1079, 0.1095, 0.1164, 0.0975)
"""Weight of each turning RoPE pair in a near head's score, for the largest smallest margin."""

AMPLITUDE = 400.0
MATCH, KIND = 100.0, 60.0
FOUND, ABSENT = 120.0, 60.0
NEXT_KIND, NEXT_WORD = 120.0, 60.0

WORD_BITS, WORD_DISTANCE = 7, 2
PAYLOAD_BITS, PAYLOAD_DISTANCE = 12, 4
HALF_MATCH = 1 - 2 * WORD_DISTANCE / WORD_BITS
"""Largest dot product of two different adjectives' (or nouns') codes."""

BEGIN_SCORE = MATCH * (1 + (1 + HALF_MATCH) / 2) + KIND
"""Score of the first token in layer 1, halfway between a right and a half-right token."""


class Kind(IntEnum):
    """Class of a token; the value is its dimension in the residual stream."""

    OTHER = 0
    BEGIN = 1
    ADJECTIVE = 2
    NOUN = 3
    OPENS = 4
    CUE = 5
    FIRST_HALF = 6
    SECOND_HALF = 7
    COMMA = 8
    SAYS = 9
    FORENAME = 10
    SURNAME = 11
    MISSING = 12
    END = 13


class Stream:
    """A division of the residual stream's dimensions."""

    KIND = slice(0, 14)
    BALANCE = 14
    ADJECTIVE = slice(15, 22)
    NOUN = slice(22, 29)
    PAYLOAD = slice(29, 41)
    NEAR_NOUN = slice(41, 48)
    NO_NEAR_NOUN = 48
    NEAR_ADJECTIVE = slice(49, 56)
    NO_NEAR_ADJECTIVE = 56
    FORENAME = slice(57, 69)
    SURNAME = slice(69, 81)
    FIRST_HALF = slice(81, 93)
    SECOND_HALF = slice(93, 105)


EMBEDDING_NORM2 = 8.0
NEAR_DISTANCE = {Kind.CUE: (2, 3), Kind.FIRST_HALF: (3, 4), Kind.SECOND_HALF: (4, 5)}
"""Distance from a token of this class back to the noun and to the adjective of its strongbox."""


def frequencies() -> list[float]:
    """List the RoPE pairs' turns per token, in radians, fastest first."""
    return [THETA ** (-pair / PAIRS) for pair in range(PAIRS)]
