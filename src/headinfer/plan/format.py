"""The forms in which tokens lie in memory, and the bytes that they take. Pure arithmetic."""

import enum

from headinfer.eight_bits.layout import Code, EightBitLayout
from headinfer.packed.layout import PAGE_TOKENS, PageLayout, packs

_ATTENDED = {"dense": 1.0, "packed": 0.87, "int8": 0.6, "fp8": 0.49}
"""Bytes of a form that the CPU attends in a second, over those of dense tokens.

Measured with 16 threads of a Xeon with a matrix unit, a head_dim of 128 and a group of four, by
`benchmarks/packed_kernel.py`. Where the CPU's share adapts it only begins by this.
"""


class Format(enum.Enum):
    """A form of the tokens of a head in memory, in rows of equal size.

    Attributes:
        code: that values are rounded to; None where every bit comes back.
        row_tokens: tokens of a row.
        attended: bytes that the CPU attends in a second, over those of dense tokens.
    """

    code: Code | None
    row_tokens: int
    attended: float

    DENSE = "dense"
    """As they are computed: a row is a token's."""

    PACKED = "packed"
    """By a lossless code: a row is a page of `PAGE_TOKENS` tokens."""

    INT8 = "int8"
    """Rounded to whole numbers of 8 bits, with scales; approximate. A row is such a page, too."""

    FP8 = "fp8"
    """Rounded to floating point of 8 bits, with scales; the same."""

    def __init__(self, value: str) -> None:
        self.code = Code(value) if value in ("int8", "fp8") else None
        self.row_tokens = 1 if value == "dense" else PAGE_TOKENS
        self.attended = _ATTENDED[value]

    def rows(self, tokens: int) -> int:
        """Return the rows that so many tokens take; the last one may be partly filled."""
        return -(-tokens // self.row_tokens)

    def covering(self, tokens: int) -> int:
        """Return the tokens of the rows that so many tokens take."""
        return -(-tokens // self.row_tokens) * self.row_tokens

    def row_bytes(self, dim: int, itemsize: int) -> int:
        """Return the bytes of a row of keys, or of values.

        Args:
            dim: elements of one key or value.
            itemsize: bytes of an element as it is computed.
        """
        if self.code is not None:
            return EightBitLayout(self.code, dim).page_bytes
        return PageLayout(dim).page_bytes if self is Format.PACKED else dim * itemsize


def can_pack(key_dim: int, value_dim: int) -> bool:
    """Whether keys and values of such a size can lie in pages; packed ones must be bfloat16."""
    return packs(key_dim) and packs(value_dim)
