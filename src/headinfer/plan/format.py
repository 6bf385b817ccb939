"""The forms in which tokens lie in memory, and the bytes that they take. Pure arithmetic."""

import enum

from headinfer.eight_bits.layout import Code, EightBitLayout
from headinfer.packed.layout import PAGE_TOKENS, PageLayout, packs


class Format(enum.Enum):
    """A form of the tokens of a head in memory, in rows of equal size.

    Attributes:
        code: that values are rounded to; None where every bit comes back.
        row_tokens: tokens of a row.
    """

    code: Code | None
    row_tokens: int

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
