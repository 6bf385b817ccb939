"""The forms in which tokens lie in memory, and the bytes that they take. Pure arithmetic."""

import enum

from headinfer.packed.layout import PAGE_TOKENS, PageLayout, packs


class Format(enum.Enum):
    """A form of the tokens of a head in memory, in rows of equal size."""

    DENSE = "dense"
    """As they are computed: a row is a token's."""

    PACKED = "packed"
    """By a lossless code: a row is a page of `PAGE_TOKENS` tokens."""

    @property
    def row_tokens(self) -> int:
        """Tokens of a row."""
        return PAGE_TOKENS if self is Format.PACKED else 1

    def rows(self, tokens: int) -> int:
        """Return the rows that so many tokens take; the last one may be partly filled."""
        return -(-tokens // self.row_tokens)

    def row_bytes(self, dim: int, itemsize: int) -> int:
        """Return the bytes of a row of keys, or of values.

        Args:
            dim: elements of one key or value.
            itemsize: bytes of an element as it is computed.
        """
        return PageLayout(dim).page_bytes if self is Format.PACKED else dim * itemsize


def can_pack(key_dim: int, value_dim: int) -> bool:
    """Whether keys and values of such a size can be packed, where they are bfloat16."""
    return packs(key_dim) and packs(value_dim)
